"""Answers that no server should give: each fails its own conversation, in bounded time, memory and price."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultralong.data.chat import endpoint as endpoints
from ultralong.data.chat.endpoint import Endpoint
from ultralong.data.chat.refine import RefineSettings, refine
from ultralong.data.chat.transport import Watch
from ultralong.data.read.conversations import Conversation
from ultralong.utils.files import locked, read_jsonl


def completion(text="fine", usage=None):
    return json.dumps(
        {"choices": [{"message": {"content": text}}], **({} if usage is None else {"usage": usage})}
    ).encode()


BODIES = {
    "deep": b'{"choices": ' + b"[" * 100_000,
    "surrogate": b'{"choices": [{"message": {"content": "half \\ud800 a pair"}}]}',
    "list": b"[1, 2]",
    "choice is a text": b'{"choices": ["x"]}',
    "huge integer": b'{"choices": [' + b"7" * 5000 + b"]}",
    "large": completion("x" * 300_000),
    "bytes": b"\xff\xfe\x00",
}
USAGES = {
    "negative": {"prompt_tokens": -1_000_000, "completion_tokens": -5},
    "huge": {"prompt_tokens": 10**15, "completion_tokens": 10**400},
    "a list": [1, 2],
    "a text": "many",
    "odd types": {"prompt_tokens": True, "completion_tokens": "7"},
    "null": {"prompt_tokens": None},
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
        kind = asked.split("[user]\n")[1].split("\n")[0]
        with contextlib.suppress(OSError):
            self.act(kind)

    def act(self, kind):
        if kind.startswith("drip"):
            self.connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" if kind == "drip body" else b"HTTP/1.1 200"
            )
            while not self.server.done.wait(0.05):
                self.connection.sendall(b" ")
        elif kind == "stall":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{")
            self.server.done.wait(20)
        elif kind == "reset":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{")
        elif kind == "endless":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not self.server.done.is_set():
                self.connection.sendall(b" " * 65536)
        elif kind.startswith("wait "):
            self.send_response(503)
            self.send_header("Retry-After", kind[5:])
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            body = BODIES[kind] if kind in BODIES else completion(usage=USAGES.get(kind))
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.done = True, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.done.set()
    server.shutdown()
    thread.join()
    server.server_close()


def talks(*questions):
    return [
        Conversation(f"t{n}", [{"role": "user", "content": q}, {"role": "assistant", "content": "draft"}])
        for n, q in enumerate(questions)
    ]


def settings(url, **options):
    budget = options.pop("budget_tokens", None)
    return RefineSettings(
        Endpoint(url, "m", **{"retries": 1, "backoff": 0.01, "longest_backoff": 0.05, "max_tokens": 50, **options}),
        budget_tokens=budget,
    )


@pytest.mark.parametrize("kind", BODIES)
def test_an_odd_body_fails_its_conversation_alone(url, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(endpoints, "LARGEST_ANSWER", 1 << 17)
    report = refine(talks("good", kind, "good too"), tmp_path, settings(url), quiet=True)
    assert (report.refined, report.failed) == (2, 1)
    assert [record["status"] for record in read_jsonl(tmp_path / "refined.jsonl")] == ["refined", "failed", "refined"]


@pytest.mark.parametrize("kind", ["drip body", "drip headers", "stall", "endless", "reset"])
def test_a_server_that_never_ends_is_left_at_the_deadline(url, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(endpoints, "LARGEST_ANSWER", 1 << 20)
    begun = time.monotonic()
    report = refine(talks(kind, "good"), tmp_path, settings(url, deadline=1.0, timeout=5.0), quiet=True)
    assert (report.refined, report.failed) == (1, 1)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("kind", USAGES)
def test_an_odd_count_neither_refills_nor_drains_a_budget(url, tmp_path, kind):
    report = refine(talks(kind), tmp_path, settings(url), quiet=True)
    assert report.refined == 1
    assert 0 < report.prompt_tokens < 5_000
    assert 0 < report.answer_tokens <= 50
    again = refine(talks(kind, "good"), tmp_path, settings(url, budget_tokens=report.prompt_tokens + 60), quiet=True)
    assert again.left == 1, "what was used stays used"


@pytest.mark.parametrize(
    "value", ["Fri, 99 Dec 99999 99:99:99 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", "1e400", "nan", "-7", "soon", ""]
)
def test_a_time_to_wait_beyond_the_calendar(url, tmp_path, value):
    begun = time.monotonic()
    report = refine(talks(f"wait {value}", "good"), tmp_path, settings(url), quiet=True)
    assert (report.refined, report.failed) == (1, 1)
    assert time.monotonic() - begun < 15


def test_two_refinements_of_one_folder_are_refused(url, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="Another process is writing"):
        refine(talks("good"), tmp_path, settings(url), quiet=True)
    (tmp_path / ".refined.jsonl.abcdef012345.partial").write_text("left by a kill")
    refine(talks("good"), tmp_path, settings(url), quiet=True)
    assert not list(tmp_path.glob("*.partial"))


def test_a_deadline_that_passes_while_the_connection_is_made_ends_the_request():
    with socket.create_server(("127.0.0.1", 0)) as server, Watch(60.0) as watch:
        made = watch.connection(http.client.HTTPConnection, f"127.0.0.1:{server.getsockname()[1]}", timeout=5.0)
        watch._cut()  # the lookup of a name took longer than the request may take
        with pytest.raises(TimeoutError, match="deadline"):
            made.connect()
        assert made.sock is None


@pytest.fixture
def hanging(monkeypatch):
    """Lookups of names that end in .slow hang; how many of them are under way."""
    known, done, count = socket.getaddrinfo, threading.Event(), []

    def look_up(host, *arguments, **options):
        if host.endswith(".slow"):
            count.append(host)
            done.wait(30)
        return known("127.0.0.1" if host.endswith((".slow", ".here")) else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield count
    done.set()


@pytest.mark.parametrize("limit", ["deadline", "timeout"])
def test_a_lookup_that_hangs_is_given_up_unpaid(hanging, tmp_path, limit):
    """The system's own lookup has no time-out; those who wait for one name share one."""
    slow = settings("http://name.slow:9/v1", **{limit: 0.2})
    start = time.monotonic()
    report = refine(talks("good", "good too"), tmp_path, slow, quiet=True)
    assert time.monotonic() - start < 15
    assert (report.refined, report.failed, hanging) == (0, 2, ["name.slow"])
    reasons = [record["error"] for record in read_jsonl(tmp_path / "refined.jsonl")]
    assert all("the address of name.slow was not found within" in reason for reason in reasons)


def test_the_next_address_of_a_name_is_tried(hanging, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        shut = closed.getsockname()
        closed.close()
        entry = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        places = [(*entry, shut), (*entry, server.getsockname())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: places)
        with Watch(60.0) as watch:
            made = watch.connection(http.client.HTTPConnection, "two.here:80", timeout=5.0)
            made.connect()
            assert made.sock.getpeername() == server.getsockname()
            assert made.sock.gettimeout() == 5.0
            made.close()


def test_a_handshake_that_stalls_is_cut(hanging):
    """Also over TLS, whose socket is another one than the connection's."""
    with socket.create_server(("127.0.0.1", 0)) as server, Watch(0.3) as watch:
        port = server.getsockname()[1]
        made = watch.connection(http.client.HTTPSConnection, f"name.here:{port}", timeout=60.0)
        start = time.monotonic()
        with pytest.raises(OSError):
            made.connect()
        assert watch.over
        assert time.monotonic() - start < 30
