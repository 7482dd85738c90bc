"""A key or a password reaches the host it is meant for and nobody else: no error, no proxy, no redirect."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultralong.data.chat.endpoint import Client, Endpoint, RequestFailed
from ultralong.data.chat.transport import check_address, is_this_machine
from ultralong.data.read.registries import RegistryError, _file_address, _open
from ultralong.evaluation.runs.checks import check_needs
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.inference.openai_engine import OpenAIEngine

KEY = "sk-this-is-secret"


class Recorder(ThreadingHTTPServer):
    """Answers every request, or redirects those to `/away` and `/near`; notes paths and headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.away, self.says = [], "", {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, dict(self.headers)))
        target = {"/away": self.server.away, "/near": "/there"}.get(self.path.removesuffix("/completions"))
        says = {"choices": [{"message": {"content": "Yes."}, "text": "Yes."}], "data": [{"id": "m"}]}
        said = self.server.says.get(self.path, (200, says))
        body = said[1] if isinstance(said[1], bytes) else json.dumps(said[1]).encode()
        self.send_response(said[0] if target is None else 307 if "completions" in self.path else 302)
        self.send_header("Content-Type", "application/json")
        if target is not None:
            self.send_header("Location", target)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def start():
    servers = []

    def make():
        server = Recorder()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("wrong", ["\n", "\r", "\x00", "\t", "\x7f", "\u00e9"])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch, wrong):
    """A header with a line break in it is refused by Python in words that hold the header."""
    if wrong == "\x00":
        monkeypatch.setattr("os.environ", {"MY_KEY": f"sk-this{wrong}-is-secret"})
    else:
        monkeypatch.setenv("MY_KEY", f"sk-this{wrong}-is-secret")
    with pytest.raises(ValueError, match="MY_KEY holds a line break, or another character") as error:
        Client(Endpoint("http://localhost:1/v1", "m", "MY_KEY"))
    assert "sk-this" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_what_is_meant_for_this_machine_passes_no_proxy(start, monkeypatch, host, variable):
    """The proxy of an environment would read key and conversations."""
    server, proxy = start(), start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy.url)
    monkeypatch.setenv("MY_KEY", KEY)
    client = Client(Endpoint(f"http://{host}:{server.server_port}/v1", "m", "MY_KEY", retries=0))
    if host == "127.0.0.2":  # served on another loopback address than it listens on: no connection, and no proxy
        with pytest.raises(RequestFailed):
            client.ask([{"role": "user", "content": "secret"}])
    else:
        assert client.ask([{"role": "user", "content": "secret"}]).text == "Yes."
        assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    assert not proxy.seen


def test_another_machine_is_reached_through_the_proxy(start, monkeypatch):
    proxy = start()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert Client(Endpoint("http://host.invalid/v1", "m", retries=0)).ask([{"role": "user", "content": "x"}]).text
    assert proxy.seen[0][0] == "http://host.invalid/v1/chat/completions"


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True), ("LOCALHOST.", True), ("api.localhost", True), ("127.0.0.1", True), ("127.9.9.9", True),
        ("::1", True), ("example.org", False), ("localhost.example.org", False), ("10.0.0.1", False),
        ("127.0.0.1.nip.io", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_which_hosts_are_this_machine(host, here):
    assert is_this_machine(host) == here


@pytest.mark.parametrize(("where", "told"), [("/away", False), ("/near", True), ("/direct", True)])
def test_a_password_of_an_index_stays_with_its_host(start, where, told):
    index, other = start(), start()
    index.away = f"{other.url}/file"
    address = index.url.replace("http://", "http://user:secret@")
    with _open(address + where, None) as answer:
        answer.read()
    pair = "Basic " + base64.b64encode(b"user:secret").decode()
    assert index.seen[0][1]["Authorization"] == pair
    last = (other if where == "/away" else index).seen[-1][1]
    assert (last.get("Authorization") == pair) == told
    assert told or not any("secret" in str(headers) or pair in headers.values() for _, headers in other.seen)


@pytest.mark.parametrize("said", [b"[1]", b'{"files": 7}', b'{"files": [1]}', b"[" * 100_000, b"\xff", b"7" * 5000])
def test_an_odd_page_of_an_index_is_one_line(start, said, monkeypatch):
    index = start()
    index.says["/odd/"] = (200, said)
    with pytest.raises(RegistryError, match="no list of files"):
        _file_address(f"{index.url}/odd/", "a.whl", None)
    monkeypatch.setattr("ultralong.data.read.registries.LARGEST_PAGE", len(said) - 1)
    with pytest.raises(RegistryError, match="more than"):
        _file_address(f"{index.url}/odd/", "a.whl", None)


def test_another_port_is_another_host(start):
    """The same name with a server of someone else on another port gets no password."""
    index, other = start(), start()
    index.away = other.url.replace("127.0.0.1", "localhost") + "/file"
    with _open(index.url.replace("http://", "http://user:secret@") + "/away", None) as answer:
        answer.read()
    assert "Authorization" not in other.seen[0][1]


@pytest.mark.parametrize(
    "url", ["http://u:secret@localhost/v1", "http://localhost/v1?key=secret", "https://x/v1#secret"]
)
def test_a_key_in_an_address_is_refused_before_it_is_written_anywhere(tmp_path, url):
    with pytest.raises(ValueError, match="a key does not belong into the address") as error:
        Endpoint(url, "m")
    wanted = RunSettings("model", ("ruler_vt",), engine="openai", endpoint=url)
    with pytest.raises(ValueError, match="a key does not belong into the address") as other:
        check_needs(["ruler_vt"], wanted)
    assert "secret" not in f"{error.value} {other.value}"


@pytest.mark.parametrize(
    "url", ["http://localhost:99999/v1", "http://[::1/v1", "http://local\nhost/v1", "localhost:80"]
)
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(ValueError, match="must be like http"):
        check_address(url, None)


class Words:
    """A tokenizer of words."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_engine_that_asks_an_endpoint_keeps_key_and_texts_to_it(start, monkeypatch, variable):
    """The client of OpenAI's package takes proxies of the environment, follows redirects, repeats what it is told."""
    server, other = start(), start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, other.url)
    monkeypatch.setenv("MY_KEY", KEY)
    assert OpenAIEngine(server.url, Words(), key_variable="MY_KEY").answer([[1]], [1])[0].text == "Yes."
    server.away = f"{other.url}/completions"
    with pytest.raises(ValueError, match="no answer to 1 tokens"):
        OpenAIEngine(f"{server.url}/away", Words(), "m", "MY_KEY").answer([[1]], [1])
    assert server.seen
    assert not other.seen
    server.says["/completions"] = (401, {"error": {"message": f"no such key: {KEY}"}})
    with pytest.raises(ValueError, match=r"no such key: \*\*\*") as error:
        OpenAIEngine(server.url, Words(), "m", "MY_KEY").answer([[1]], [1])
    assert KEY not in str(error.value)
    with pytest.raises(ValueError, match="in the clear"):
        OpenAIEngine("http://example.org/v1", Words(), "m", "MY_KEY")


@pytest.mark.parametrize("said", [b"<html>", {"choices": []}, {"choices": [{"text": None}]}, [], b"[" * 99_999])
def test_an_odd_answer_to_the_engine_is_one_line(start, said):
    server = start()
    server.says = {"/completions": (200, said), "/models": (200, said)}
    for asked in (
        lambda: OpenAIEngine(server.url, Words(), "m").answer([[1]], [1]),
        lambda: OpenAIEngine(server.url, Words()),
    ):
        with pytest.raises(ValueError, match=server.url) as error:
            asked()
        assert "\n" not in str(error.value)
