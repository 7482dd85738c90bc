"""The server as a process that is stopped or killed while it answers: how answers end, in what time, what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ultralong import miniature
from ultralong.inference.decoding import Sampling
from ultralong.inference.server import worker
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.tickets import Job

LONG, SHORT = 480, 40  # tokens of an answer: seconds, and some tenths of one
REFUSED = b'"code": "server_stopping"'


class Server:
    """`ultralong serve` of the miniature, in a session of its own as a terminal's command.

    Args:
        python: The interpreter.
        port: Where it listens; 0 takes a free one.
        options: Further words.
    """

    def __init__(self, python: str, *options: str, port: int = 0) -> None:
        words = [python, "-m", "ultralong", "serve", str(miniature.path()), "--device", "cpu", "--port", str(port)]
        self.process = subprocess.Popen(
            [*words, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127.0.0.1:(\d+)/v1", line)
        assert found, line + self.process.stdout.read()
        self.port = int(found[1])

    def ask(self, tokens: int, stream: bool = True) -> socket.socket:
        """A client that has sent a request, and of a stream got its beginning."""
        body = {"model": "miniature", "prompt": [7, 8, 9], "max_tokens": tokens, "stream": stream, "seed": 1}
        text = json.dumps({**body, "temperature": 1.0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n"
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
        if stream:
            got = client.recv(65536, socket.MSG_PEEK)
            while got.count(b"data: ") < 2:
                time.sleep(0.01)
                got = client.recv(65536, socket.MSG_PEEK)
        return client

    def family(self) -> list[int]:
        """Processes of the session that are there."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(entry))
        return found

    def is_gone(self) -> bool:
        """Whether the process has ended, and soon all that it had started."""
        until = time.monotonic() + 20
        while self.family() and time.monotonic() < until:
            time.sleep(0.05)
        return self.process.poll() is not None and not self.family()


def rest(client: socket.socket) -> bytes:
    """All that still comes, to the end of the connection."""
    got = b""
    with client, contextlib.suppress(ConnectionResetError):  # of one that is killed
        while piece := client.recv(65536):
            got += piece
    return got


@pytest.fixture
def start():
    """Start servers; those that a failed test leaves are killed."""
    begun: list[Server] = []

    def make(*options: str, port: int = 0) -> Server:
        begun.append(Server(sys.executable, *options, port=port))
        return begun[-1]

    yield make
    for server in begun:
        with server.process as process:
            for pid in {process.pid, *server.family()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def told_one(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)


def told_all(server: Server) -> None:
    """As systemd tells all processes of a service."""
    for pid in server.family():
        os.kill(pid, signal.SIGTERM)


def interrupted_all(server: Server) -> None:
    """As told_all where a service is stopped by SIGINT, and the command is the last to hear."""
    for pid in sorted(server.family(), key=lambda each: each == server.process.pid):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)


def typed(server: Server) -> None:
    """As a terminal sends Ctrl-C to the command's process group."""
    os.killpg(server.process.pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "stop", "code"),
    [("1", told_one, -15), ("2", told_one, -15), ("2", told_all, -15), ("1", typed, 130), ("2", typed, 130)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_has_not_ended_by_the_grace_is_refused(start, gpus, stop, code):
    """Also where several processes share a prompt: the command's own one, which is told, does not answer there."""
    server = start("--gpus", gpus, "--grace", "0")
    streamed, waits = server.ask(LONG), server.ask(LONG, stream=False)
    stop(server)
    begun = time.monotonic()
    ends = rest(streamed), rest(waits)
    *_, last = (line for line in ends[0].splitlines() if line.startswith(b"data: "))
    assert REFUSED in last
    assert len(ends[0]) < LONG * 200, "it was left in the middle"
    assert ends[1].startswith(b"HTTP/1.1 503"), ends[1]
    assert server.process.wait(30) == code, server.process.stdout.read()
    assert time.monotonic() - begun < 15
    assert server.is_gone()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_second_ctrl_c_ends_it_at_once(start, gpus):
    server = start("--gpus", gpus, "--grace", "120")
    streamed = server.ask(LONG)
    typed(server)
    time.sleep(0.3)
    typed(server)
    begun = time.monotonic()
    assert b"data: [DONE]" not in rest(streamed)
    assert server.process.wait(30) == 130, server.process.stdout.read()
    assert time.monotonic() - begun < 15
    assert server.is_gone()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "stop", "tokens"),
    [("1", told_one, SHORT), ("2", told_all, SHORT), ("2", typed, SHORT), ("2", interrupted_all, LONG // 2)],
)
def test_within_the_grace_an_answer_ends_as_ever(start, gpus, stop, tokens):
    server = start("--gpus", gpus, "--grace", "120")
    streamed = server.ask(tokens)
    stop(server)
    begun, end = time.monotonic(), rest(streamed)
    assert b"data: [DONE]" in end
    assert REFUSED not in end
    server.process.wait(30)
    assert time.monotonic() - begun < 60, "nothing is waited for when nothing is left to answer"
    with pytest.raises(ConnectionRefusedError):
        server.ask(1)
    assert server.is_gone()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_after_a_kill_the_port_is_free_at_once(start, gpus):
    server = start("--gpus", gpus)
    streamed = server.ask(LONG)
    server.process.kill()
    again = start("--gpus", gpus, port=server.port)
    assert b"[DONE]" not in rest(streamed), "it was killed in mid-answer"
    assert server.is_gone()
    assert b"data: [DONE]" in rest_of_one(again)


def rest_of_one(server: Server) -> bytes:
    """A whole stream; the connection stays open behind it."""
    got = b""
    with server.ask(SHORT) as client:
        while b"[DONE]" not in got and (piece := client.recv(65536)):
            got += piece
    return got


@pytest.mark.slow
def test_a_killed_rank_ends_the_server(start):
    """The others wait in a collective that it has left: clients are told, and the command fails."""
    server = start("--gpus", "2")
    streamed = server.ask(LONG)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if int(child) in server.family()]
    os.kill(ranks[-1], signal.SIGKILL)
    assert b"data: [DONE]" not in rest(streamed)
    assert server.process.wait(30) == 1
    assert server.is_gone()


@pytest.mark.parametrize(("ranks", "ended"), [(1, []), (2, [1])])
def test_a_stop_waits_so_long_for_a_chunk(monkeypatch, ranks, ended):
    """Then several processes end as they stand: in a collective nobody hears that it is over."""
    codes, begun, over = [], threading.Event(), threading.Event()
    monkeypatch.setattr(worker.os, "_exit", codes.append)

    def stream(*_, **__):
        begun.set()
        assert over.wait(60)
        yield from ()

    model = SimpleNamespace(device=torch.device("cpu"))
    engine = SimpleNamespace(ranks=ranks, model=model, tokenizer=None, stream=stream, reused=0)
    busy = worker.Worker(engine, limit=100, waiting=1, metrics=Metrics())
    busy.start()

    async def ask():
        busy.submit(Job((1, 2), 1, Sampling()))
        await asyncio.to_thread(begun.wait, 60)
        busy.stop(timeout=0.2)
        over.set()

    asyncio.run(ask())
    assert codes == ended
    busy.stop()
    assert codes == ended, "the chunk has ended by then"
