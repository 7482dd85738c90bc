"""Bodies that are made to cost much: nobody else waits for their refusal. And long texts that are read in pieces."""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from serve_load import peak_mib

from ultralong import miniature
from ultralong.inference.server import bodies
from ultralong.inference.server.bodies import understood
from ultralong.inference.server.requests import ChatRequest, CompletionRequest
from ultralong.inference.server.tickets import Refused

MILLION = 10**6
LONGEST = 1.0  # seconds that others may wait; 0.02 to 0.1 on two idle cores, 8 to 26 and the end by memory before
START, TALK = '{"model": "mini", "prompt": "x", "max_tokens": 1, ', '{"model": "mini", "max_tokens": 1, "messages": ['
EMPTY = '{"role": "user", "content": ""}'


@pytest.fixture(scope="module")
def served():
    """A server in a process of its own, as its threads wait for each other and not for the client's: pid and port."""
    command = [sys.executable, "-m", "ultralong", "serve", str(miniature.path()), "--port", "0", "--name", "mini"]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.pid, int(re.search(r":(\d+)/v1", process.stdout.readline())[1])
        finally:
            process.terminate()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as line:
        line.request(method, path, body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        return answer.status, answer.read().decode()


class Watch:
    """Asks for /health again and again; the longest time that it took."""

    def __init__(self, port: int) -> None:
        self.longest, self._port, self._ended = 0.0, port, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.is_set():
            began = time.perf_counter()
            assert ask(self._port, "GET", "/health")[0] == 200
            self.longest = max(self.longest, time.perf_counter() - began)
            time.sleep(0.01)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (lambda: START + ",".join(f'"k{n}": 1' for n in range(MILLION)) + "}", 413, "names, texts, lists and objects"),
        (lambda: START + ",".join(f'"k{n}": 1' for n in range(70_000)) + "}", 400, "k0: this server does not support"),
        (lambda: START + '"logit_bias": {' + ",".join(f'"{n}": 1' for n in range(MILLION)) + "}}", 413, "names"),
        (lambda: START + '"metadata": {' + ",".join(f'"{n}": 1' for n in range(70_000)) + "}}", 400, "metadata"),
        (lambda: TALK + "1," * MILLION + "1]}", 413, "values"),
        (lambda: TALK + "1," * 90_000 + "1]}", 400, "messages.0: Input should be a valid dictionary"),
        (lambda: TALK + '{"a": 1},' * 40_000 + "1]}", 400, "messages.0.role: Field required"),
        (lambda: TALK + ",".join([EMPTY] * MILLION) + "]}", 413, "names"),
        (lambda: TALK + ",".join([EMPTY] * 25_000) + "]}", 400, "more than 512 tokens"),
        (lambda: START + '"tools": ' + "[" * MILLION + "]" * MILLION + "}", 413, "lists"),
        (lambda: START + '"tools": [' + "[]," * 100_000 + "1]}", 400, "tools: this server does not support"),
        (lambda: START + '"stop": [' + '"a",' * 100_000 + '"a"]}', 400, "stop takes up to 16"),
        (lambda: START + '"stop": [' + "1," * 100_000 + "1]}", 400, "stop"),
        (lambda: START + '"stop": ["' + "\\u4e2d" * 5 * MILLION + '"]}', 400, "stop takes up to 16"),
        (lambda: START + '"' + "k" * 30 * MILLION + '": 1}', 400, "k" * 200 + ": this server does not support"),
        (lambda: START + '"seed": ' + "9" * 30 * MILLION + "}", 400, "can't be read as JSON"),
        (lambda: '{"model": "mini", "prompt": [' + "5," * 10 * MILLION + "5]}", 413, "values"),
    ],
    ids=range(17),
)  # fmt: skip
def test_others_are_answered_while_a_hostile_body_is_refused(served, make, status, words):
    """A million unknown keys held them for 8 s, messages that are numbers for minutes; 30 million ended the process."""
    pid, port = served
    body = make().encode()
    route = "/v1/chat/completions" if body.startswith(TALK.encode()) else "/v1/completions"
    before = peak_mib(pid)
    with Watch(port) as watch:
        found, said = ask(port, "POST", route, body)
    assert (found, words in said) == (status, True), said[:300]
    assert len(said) < 1000
    assert watch.longest < LONGEST
    assert peak_mib(pid) - before < 150 + 6 * len(body) / 2**20


def given(text: str) -> str:
    return understood(CompletionRequest, text.encode(), MILLION).prompt_


@pytest.mark.parametrize("piece", [16, 17, 23, 64])
def test_a_long_text_read_in_pieces_is_the_one_that_json_reads(monkeypatch, piece):
    """Cut anywhere, but within no escape, pair of surrogates or character."""
    monkeypatch.setattr(bodies, "PIECE", piece)
    monkeypatch.setattr(bodies, "LONG", 0)
    draw = random.Random(piece)
    parts = [
        "word ",
        "\\\\",
        '\\"',
        "\\n",
        "\\u4e2d",
        "\\ud83d\\ude00",
        "\u4e2d",
        "\U0001f600",
        "a",
        "/",
        "\\/",
        "{[,]}",
    ]
    for _ in range(300):
        text = '{"model": "m", "seed": 1.0, "prompt": "' + "".join(draw.choices(parts, k=draw.randint(0, 60))) + '"}'
        assert given(text) == json.loads(text)["prompt"]
    for broken in ("\\u12", "\\q", "\n", "\\", "\\ud83d"):
        text = '{"model": "m", "prompt": "' + "a" * draw.randint(0, 40) + broken + "z" * 40 + '"}'
        with pytest.raises(Refused, match=r"JSON|surrogate"):
            given(text)


@pytest.mark.parametrize(
    "text", ['{"model": "m", "prompt": "a\nb"}', '{"model": "m", "prompt": "abc', '{"model": "m" x}']
)
def test_where_a_text_is_no_json_is_told_also_of_a_long_one(monkeypatch, text):
    text = text.replace("{", "{" + " " * 50, 1)
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(text)
    for long in (bodies.LONG, 0):
        monkeypatch.setattr(bodies, "PIECE", 16)
        monkeypatch.setattr(bodies, "LONG", long)
        with pytest.raises(Refused, match=f"no JSON: .*, behind character {error.value.pos}$"):
            given(text)


def test_halves_of_characters_that_are_not_spelled_are_read_once(monkeypatch):
    """Where the cut is behind one, five characters before it were read again."""
    monkeypatch.setattr(bodies, "PIECE", 16)
    monkeypatch.setattr(bodies, "LONG", 0)
    for before in range(16):
        text = json.dumps("a" * before + "bcdefgh\ud83d\ude00" * 9, ensure_ascii=False)
        assert bodies._parsed(text.encode("utf-8", "surrogatepass")) == json.loads(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_other_encodings_of_json_are_counted_as_they_are_read(encoding):
    body = json.dumps({"model": "m", "prompt": "\u4e2c\u2c2c a, b"}).encode(encoding)
    assert understood(CompletionRequest, body, 10).prompt_ == "\u4e2c\u2c2c a, b"
    with pytest.raises(Refused, match="values"):
        understood(CompletionRequest, json.dumps({"model": "m", "prompt": [1] * 20}).encode(encoding), 10)


def test_what_stands_in_texts_is_not_counted(monkeypatch):
    monkeypatch.setattr(bodies, "PIECE", 31)
    monkeypatch.setattr(bodies, "OTHERS", 12)
    talk = [{"role": "user", "content": '[{"a\\", \\\\": 1}, {}]' * 40 + "\\"}]
    body = json.dumps({"model": "m", "messages": talk}).encode()
    assert understood(ChatRequest, body, 5).messages[0].content[0].text == talk[0]["content"]
    with pytest.raises(Refused, match="12 names, texts"):
        understood(ChatRequest, json.dumps({"model": "m", "messages": talk * 2}).encode(), 50)
