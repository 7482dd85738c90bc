"""Requests that a server must outlive: of other people's web pages, without an end, or made to cost much."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ultralong import extend, miniature
from ultralong.inference.batched import cache_bytes
from ultralong.inference.server import app, connections, gate, requests
from ultralong.inference.server.serve import check_window, most_tokens, serve
from ultralong.inference.server.settings import ServeSettings
from ultralong.inference.server.tickets import Refused


@pytest.fixture(scope="module")
def port():
    known, found = threading.Event(), []

    def ready(server) -> None:
        found.append(server)
        known.set()

    wanted = ServeSettings(str(miniature.path()), port=0, device="cpu", name="mini", chunk=64, answer_tokens=4)
    thread = threading.Thread(target=serve, args=(wanted, ready), daemon=True)
    thread.start()
    assert known.wait(120)
    while not found[0].started:
        time.sleep(0.02)
    yield found[0].servers[0].sockets[0].getsockname()[1]
    found[0].should_exit = True
    thread.join(60)


def send(port: int, head: str, body: bytes = b"", timeout: float = 30.0) -> tuple[int, bytes]:
    """Bytes as they are; the status and what came with it, 0 where the server closed the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as line:
        line.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        said = b""
        while piece := line.recv(65536):
            said += piece
    return (int(said.split()[1]), said) if said else (0, said)


def ask(port: int, body: bytes, *headers: str, route: str = "completions") -> tuple[int, bytes]:
    lines = [
        f"POST /v1/{route} HTTP/1.1", f"Content-Length: {len(body)}", "Content-Type: application/json",
        *(headers or ["Host: localhost"]), "Connection: close",
    ]  # fmt: skip
    return send(port, "\n".join(lines) + "\n", body)


def request(**changes: object) -> bytes:
    return json.dumps({"model": "mini", "prompt": "x", "max_tokens": 1, "temperature": 0, **changes}).encode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Host: 127.0.0.1:8000",), 200),
        (("Host: localhost:8000", "Origin: http://localhost:3000"), 200),
        (("Host: [::1]:8000",), 200),
        (("Host: evil.example",), 403),
        (("Host: localhost.evil.example:8000",), 403),
        (("Host: 127.0.0.1.evil.example",), 403),
        (("Host: localhost", "Origin: http://evil.example"), 403),
        (("Host: localhost", "Origin: null"), 403),
        (("Host: [::1",), 403),
    ],
)
def test_without_a_key_only_this_machine_is_answered(port, headers, status):
    """A page may let its own name point to this machine, so that a browser takes this server for the page's."""
    assert ask(port, request(), *headers)[0] == status


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; charset=application/json", "text/json"])
def test_a_page_without_a_name_for_it_is_no_json(port, kind):
    """A form of another page can send text only, which no browser asks about first."""
    body = request()
    head = f"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: {len(body)}\nContent-Type: {kind}\n"
    assert send(port, head + "Connection: close\n", body)[0] == 400


def test_a_body_that_says_not_that_it_is_json_is_told_the_header(port):
    """As curl sends it unless it is told."""
    body = request()
    head = f"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: {len(body)}\n"
    head += "Content-Type: application/x-www-form-urlencoded\nConnection: close\n"
    assert b"sent with the header Content-Type: application/json" in send(port, head, body)[1]


@pytest.mark.parametrize(("line", "status"), [("GET /v1/embeddings", 404), ("GET /v1/completions", 405)])
def test_what_is_not_served_is_told_with_what_is(port, line, status):
    found, said = send(port, f"{line} HTTP/1.1\nHost: localhost\nConnection: close\n", b"")
    assert found == status
    assert f"{line} is not served here. These are: POST /v1/chat/completions, ".encode() in said
    assert b"GET /health, GET /metrics" in said


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"a":' * 60_000, 400),
        (b'{"a":' * 100_000, 413),
        (b'{"a":' + b"[" * 200_000, 413),
        (b"\xff\xfe", 400),
        (b'{"model": "mini", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "mini", "prompt": "x", "temperature": NaN}', 400),
        (request(max_tokens=-1), 400),
        (request(max_tokens=10**30), 400),
        (request(prompt=[10**30]), 400),
        (request(prompt=[-1]), 400),
        (request(seed=2**70), 400),
        (b'{"model": "mini", "prompt": "half \\ud800 a pair", "max_tokens": 1}', 400),
        (b'{"model": "mini", "prompt": "x", "\\ud800": 1}', 400),
        (b'{"model": "\\ud800", "prompt": "x"}', 404),
        (request(stop=["x"] * 5000), 400),
        (request(stop="a" * (requests.LONGEST_STOP + 1)), 400),
        (request(stop=[""]), 400),
        (b'{"model": "no", "model": "mini", "prompt": "x", "max_tokens": 1}', 200),
    ],
    ids=range(19),
)
def test_an_odd_body_is_refused_and_the_next_one_answered(port, body, status):
    assert ask(port, body)[0] == status
    assert ask(port, request())[0] == 200


def test_a_conversation_of_control_tokens_alone_is_left_when_it_is_too_long(port):
    """Each of them is encoded by itself, as it is text: a million would take minutes, and others wait."""
    talk = {"model": "mini", "messages": [{"role": "user", "content": "<|im_end|>" * 300_000}], "max_tokens": 1}
    began = time.process_time()
    status, said = ask(port, json.dumps(talk).encode(), route="chat/completions")
    assert status == 400
    assert b"this server takes" in said
    assert time.process_time() - began < 20


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_of_a_text_that_is_too_long_by_far_only_the_beginning_is_encoded(port, route):
    """60 MiB of it took minutes, while the prompts of all others waited."""
    body = (
        {"messages": [{"role": "user", "content": "word " * 9999}]} if "chat" in route else {"prompt": "word " * 9999}
    )
    kind = requests.ChatRequest if "chat" in route else requests.CompletionRequest
    tokenizer, read = AutoTokenizer.from_pretrained(miniature.path()), []
    encode = type(tokenizer).__call__

    class Watched(type(tokenizer)):
        def __call__(self, text, *arguments, **options):
            read.append(len(text))
            return encode(self, text, *arguments, **options)

    tokenizer.__class__ = Watched
    with pytest.raises(Refused, match="this server takes 512") as error:
        kind(model="mini", **body).prompt(tokenizer, 512)
    assert error.value.code == "context_length_exceeded"
    assert sum(read) <= requests.CHARACTERS * 512
    # Long tokens: the beginning is short enough, and so is the whole.
    assert kind(model="mini", **json.loads(json.dumps(body).replace("word ", "  "))).prompt(tokenizer, 10_500)


@pytest.mark.parametrize(
    "head", ["GET /health HTTP/1.1\nX: " + "a" * (1 << 20) + "\n", "\0\1\2\n", "GET\n", "A" * (1 << 18)]
)
def test_headers_that_are_none_end_their_connection(port, head):
    try:
        status = send(port, head)[0]
    except ConnectionError:  # closed while it was being sent
        status = 0
    assert status in (0, 400, 431)
    assert ask(port, request())[0] == 200


@pytest.mark.parametrize(
    "sent", ["", "GET /health HTTP/1.1\r\nX: ", "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_a_client_that_does_not_go_on_is_left(port, sent, monkeypatch):
    """Nothing at all, half of the headers, and half of a second request."""
    monkeypatch.setattr(connections, "SECONDS", 1.0)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(sent.encode())
        while line.recv(65536):
            pass
    assert time.monotonic() - began < 25


def test_a_body_that_does_not_come_is_left(port, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 1.0)
    head = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: 99\nContent-Type: application/json\n"
    status, said = send(port, head + "Connection: close\n", b"{")
    assert status == 408, said
    assert ask(port, request())[0] == 200


def test_a_body_in_pieces_is_cut_at_the_limit(port):
    head = "POST /v1/completions HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\nConnection: close\n"
    piece = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    try:
        status = send(port, head + "Content-Type: application/json\n", piece * 70)[0]
    except ConnectionError:  # answered and closed while it was still being sent
        status = 413
    assert status == 413
    assert ask(port, request())[0] == 200


def test_of_a_body_little_is_taken_at_once(port, monkeypatch):
    """What asyncio takes at once, sent in chunks of one byte each, kept all others for more than a second."""
    taken, data_received = [], connections.Connection.data_received

    def watched(self, data):
        taken.append(len(data))
        data_received(self, data)

    monkeypatch.setattr(connections.Connection, "data_received", watched)
    assert ask(port, request(prompt="a" * 2**21))[0] == 400
    assert sum(taken) > 2**21
    assert max(taken) <= connections.READ


@pytest.mark.parametrize("key", ["two\nlines", "caf\u00e9", "tab\tin it", " "])
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("SERVE_KEY", key)
    with pytest.raises(ValueError, match="SERVE_KEY holds") as error:
        ServeSettings("model", key_variable="SERVE_KEY").key()
    assert key.strip() == "" or key not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(
            ("temperature", "top_p", "n", "stream", "stop", "seed", "presence_penalty", "logit_bias", "suffix")
        ),
        {"logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        {"prompt": ["x"]},
        {"prompt": [[5, 6]]},
    ],
)
def test_what_asks_for_nothing_is_no_fault(port, changes):
    """Clients send all options that they know, at null or at what they are by default."""
    status, said = ask(port, request(**changes))
    assert status == 200, said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": 0}, "logprobs: this server does not support it"),  # which asks for those of the answer
        ({"top_k": 20}, "top_k: this server does not support it"),
        ({"tool_choice": "required"}, "tool_choice: this server"),
        ({"prompt": [[1], [2]]}, "prompt: One prompt a request is taken"),
        ({"prompt": [True]}, "prompt: A list holds one prompt, or the token ids"),
        ({"prompt": [[5, 1.5]]}, "prompt: A list holds one prompt, or the token ids"),
        ({"prompt": {}}, "prompt: Input should be a valid string"),
        ({"stop": 5}, "stop: Input should be a valid string"),
        ({"max_tokens": True}, "max_tokens: Input should be a number"),  # which Python takes for 1
        ({"temperature": "0"}, "temperature: Input should be a number"),
        ({"n": True}, "n: Input should be a number"),
        ({"stream": "yes"}, "stream: Input should be true or false"),
        ({"store": 0}, "store: Input should be true or false"),
        ({"echo": True}, "echo: a prompt is not given back, with its log probabilities or without"),
    ],
)
def test_what_asks_for_something_else_is_refused_by_its_name(port, changes, words):
    status, said = ask(port, request(**changes))
    assert (status, words in said.decode()) == (400, True), said


def chat(*messages: object) -> bytes:
    return json.dumps({"model": "mini", "messages": messages, "max_tokens": 2, "temperature": 0}).encode()


def test_a_turn_that_a_server_gave_can_be_given_back(port):
    given = {"role": "assistant", "content": "A king.", "refusal": None, "tool_calls": [], "audio": None}
    asked = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
    status, said = ask(port, chat(asked, given, {**asked, "name": None}), route="chat/completions")
    assert status == 200, said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:,"}}], "messages.0.content.0.type: Input should be 'text'"),
        (None, "messages.0.content: Field required"),
        (5, "messages.0.content: Input should be a valid list"),
        ("\ud800", "messages.0.content.0.text: half of a surrogate pair"),
    ],
)
def test_a_message_that_is_no_text_is_named(port, content, words):
    status, said = ask(port, chat({"role": "user", "content": content}), route="chat/completions")
    assert (status, words in said.decode()) == (400, True), said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{no", b"the request is no JSON: "),
        (b'{"model": "\xff"}', b"can't be read as JSON in UTF-8"),
        (b"", b"its body is empty"),
    ],
)
def test_a_body_that_is_no_json_says_why(port, body, words):
    status, said = ask(port, body)
    assert (status, words in said) == (400, True), said


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("HEAD /health", 200, b"content-length"),  # as load balancers ask
        ("PUT /v1/completions", 405, b"allow: POST"),
        ("POST /v1/completions/", 404, b"not served here"),  # no redirect to a name that a proxy does not have
    ],
)
def test_methods_and_paths_beside_those_of_clients(port, line, status, words):
    found, said = send(port, f"{line} HTTP/1.1\nHost: localhost\nConnection: close\n")
    assert (found, words in said) == (status, True), said


def described(port: int) -> dict:
    return json.loads(send(port, "GET /openapi.json HTTP/1.0\n")[1].partition(b"\r\n\r\n")[2])


def valid(page: dict, name: str, content: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": page["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(content)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_the_description_says_what_is_taken_and_what_comes(port, route):
    """FastAPI's own had no answers, no refusals but one that is never sent, and refused null."""
    page, name = described(port), "ChatRequest" if "chat" in route else "CompletionRequest"
    text = {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"prompt": "x"}
    taken = json.loads(request()) | text
    if "chat" in route:
        del taken["prompt"]
    changes: list[dict[str, object]] = [
        {}, {"seed": None, "stop": None, "n": None, "of_another_server": None}, {"stop": ["a", "b"]}, {"top_k": -1},
        {"logprobs": False, "tools": [], "response_format": {"type": "text"}}, {"seed": 5, "temperature": 1.5},
        {"model": "other"}, {"max_tokens": 0}, {"max_tokens": "5"}, {"max_tokens": True}, {"temperature": 3},
        {"top_p": 0}, {"n": 2}, {"stream": 1}, {"store": 0}, {"logprobs": True}, {"tools": [{}]}, {"seed": 2**70},
        {"stop": ""}, {"stop": [""]}, {"stop": ["a" * 1025]}, {"stop": ["a"] * 17}, {"stop": []}, {"stop": "a"},
        {"unknown": 1}, {"messages": []}, {"prompt": ""}, {"prompt": []}, {"prompt": ["a", "b"]}, {"prompt": [["a"]]},
        *([] if "chat" in route else [{"prompt": [5]}, {"prompt": [[5, 6]]}, {"prompt": ["a"]}]),
    ]  # fmt: skip
    codes = page["paths"][f"/v1/{route}"]["post"]["responses"]
    for change in changes:
        body = taken | change
        status, said = ask(port, json.dumps(body).encode(), route=route)
        assert valid(page, name, body) == (status == 200), (change, said)
        answer = codes[str(status)]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert valid(page, answer, json.loads(said.partition(b"\r\n\r\n")[2])), said
    assert codes.keys() == {"200", "400", "403", "404", "408", "413", "429", "500", "503"}


def test_large_bodies_have_a_limit_together(port, monkeypatch):
    monkeypatch.setattr(gate, "LARGEST_BODIES", 0)
    assert ask(port, request(stop=["x"]))[0] == 200, "small ones are always taken"
    monkeypatch.setattr(gate, "SMALL_BODY", 64)
    status, said = ask(port, request(user="x" * 64))
    assert (status, b"server_busy" in said) == (503, True), said
    monkeypatch.setattr(gate, "LARGEST_BODIES", 1)
    assert ask(port, request(user="x" * 64))[0] == 200, "what has ended counts no more"


def test_the_longest_silent_connection_makes_room(port, monkeypatch):
    """Where all files of the process were taken, nobody was answered, and the log grew by a megabyte a second."""
    monkeypatch.setattr(connections.Connection, "most", 3)
    lines = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
    try:
        for line in lines:  # in the order in which they were made
            line.sendall(b"GET /health HT")
        assert ask(port, request())[0] == 200
        with suppress(ConnectionResetError):  # where the server had not read what was sent
            assert lines[0].recv(1) == b"", "the first one was to be closed"
        lines[2].sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert lines[2].recv(12) == b"HTTP/1.1 200"
    finally:
        for line in lines:
            line.close()


def test_half_of_the_files_are_for_connections(monkeypatch):
    asked = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda kind, limits: asked.append(limits))
    assert connections.claim_files() == (2048, 128)
    assert asked == [(4096, 4096)]


@pytest.mark.parametrize(("name", "status"), [("mini", 200), ("none/such", 404)])
def test_a_model_is_found_by_its_name(port, name, status):
    found, said = send(port, f"GET /v1/models/{name} HTTP/1.1\nHost: localhost\nConnection: close\n")
    assert (found, name.encode() in said) == (status, True)


def counts(port: int) -> dict[str, float]:
    lines = send(port, "GET /metrics HTTP/1.1\nHost: localhost\nConnection: close\n")[1].decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("ultralong_")}


def test_an_answer_whose_client_is_gone_is_left_though_its_tokens_come_fast(port, monkeypatch):
    """It was computed to its end: the client was looked for where no token came for half a second."""
    monkeypatch.setattr(app, "ASK_AGAIN", 0.05)
    cancelled = 'ultralong_requests_total{outcome="cancelled",route="completions"}'
    before, body = counts(port), request(max_tokens=500, prompt="Once upon a time")
    with socket.create_connection(("127.0.0.1", port)) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        time.sleep(0.1)
    for _ in range(200):
        if (after := counts(port)).get(cancelled, 0) > before.get(cancelled, 0):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the answer was not left")
    assert after["ultralong_new_tokens_total"] - before["ultralong_new_tokens_total"] < 450


@pytest.mark.parametrize(
    ("to", "options", "window"), [(2048, {"method": "linear"}, 2048), (1024, {"factor": 4.0}, 2048)]
)
def test_the_window_is_what_the_scaling_reaches(tmp_path, to, options, window):
    """max_position_embeddings of a linear scaling is the old window: no more than that was served."""
    extend("miniature", to=to, out=tmp_path / "model", quiet=True, **options)
    check_window(ServeSettings(str(tmp_path / "model"), max_tokens=window))
    with pytest.raises(ValueError, match=f"the model's window is {window:,}"):
        check_window(ServeSettings(str(tmp_path / "model"), max_tokens=window + 1))


@pytest.mark.parametrize(
    ("gpus", "kv", "asked", "expected"),
    [
        (1, "auto", None, 800),
        (2, "auto", None, 1600),
        (1, "fp8", None, 1600),
        (2, "fp8", None, 2048),
        (1, "auto", 801, 0),
    ],
)
def test_a_gpu_takes_what_its_free_memory_holds(tmp_path, gpus, kv, asked, expected, monkeypatch):
    """Keys and values get 80% of what is free; they are shared over GPUs, and half as large in fp8."""
    extend("miniature", to=2048, out=tmp_path / "model", quiet=True)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    model = SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.bfloat16)
    free = 1000 * cache_bytes(model)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 2 * free))
    wanted = ServeSettings(str(tmp_path / "model"), gpus=gpus, kv=kv, max_tokens=asked)
    if expected:
        assert most_tokens(SimpleNamespace(model=model), wanted) == expected
        return
    with pytest.raises(ValueError, match=r"holds keys and values of about 800: use more --gpus, --kv fp8, or lower it"):
        most_tokens(SimpleNamespace(model=model), wanted)
