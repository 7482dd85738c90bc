"""Processes that are killed while they send, and pipes that a fork holds open: who asked does not wait for ever."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest

from ultralong.cli.errors import mendable
from ultralong.planner.traces import child
from ultralong.utils import template_renderer
from ultralong.utils.processes import WorkerKilled, WorkerPool, answer_of, result_of, stops_passed_on


def killed_within_its_answer(size: int) -> bytes:
    """Work of a pool: half of the answer is in the pipe, and the lock of all who send is held, when it is killed."""

    def half(self: Connection, data: bytes, write: object = None) -> None:
        os.write(self.fileno(), data[: len(data) // 2] if len(data) > 100 else data)
        if len(data) > 100:
            os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half
    return bytes(size)


def test_a_worker_that_is_killed_within_its_answer_breaks_its_pool():
    pool = WorkerPool(2)
    futures = [pool.submit(time.sleep, 0.1), pool.submit(killed_within_its_answer, 1 << 20), pool.submit(len, "ab")]
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            result_of(futures[1])
        except Exception as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    asks = threading.Thread(target=ask, daemon=True)  # or a pool that hangs would take this test with it
    asks.start()
    asks.join(60)
    assert not asks.is_alive(), "the pool waits for the rest of an answer"
    assert isinstance(caught[0], WorkerKilled)
    assert mendable(caught[0])  # a command says it in one line
    with pytest.raises(WorkerKilled, match="a worker process was killed"):
        pool.submit(len, "ab")
    pool.shutdown()


def test_a_worker_that_is_killed_before_it_reads_what_it_is_given_breaks_its_pool(monkeypatch):
    resource_tracker.ensure_running()
    monkeypatch.setattr(util, "spawnv_passfds", lambda *_: os.posix_spawnp("false", ["false"], os.environ))
    pool = WorkerPool(1, print, bytes(1 << 20))
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            result_of(pool.submit(len, "ab"))
        except Exception as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    asks = threading.Thread(target=ask, daemon=True)
    asks.start()
    asks.join(60)
    assert not asks.is_alive(), "the pool writes to a process that is gone"
    assert isinstance(caught[0], WorkerKilled)
    pool.shutdown()


def test_the_pipe_of_a_process_that_has_ended_may_be_held_open_by_another():
    held = subprocess.Popen(["sh", "-c", "sleep 100 & exec sleep 100"], stdout=subprocess.PIPE, start_new_session=True)
    time.sleep(0.3)
    held.kill()
    begun = time.monotonic()
    try:
        assert answer_of(held) == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(held.pid, signal.SIGKILL)
        held.__exit__(None, None, None)
    assert time.monotonic() - begun < 30


def test_an_answer_has_a_limit_and_one_before_the_end_is_read():
    with subprocess.Popen(["sleep", "100"], stdout=subprocess.PIPE) as slow:
        assert answer_of(slow, 0.2) == ""
        slow.kill()
    with subprocess.Popen(["echo", "one"], stdout=subprocess.PIPE) as done:
        done.wait()
        assert answer_of(done) == b"one\n"


def test_an_answer_is_read_where_more_files_are_open_than_select_takes():
    """As in a server with a thousand connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, before[0]) if before[0] >= 0 else before[0], before[1]))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1100:
            held.append(os.dup(held[0]))
        with subprocess.Popen(["echo", "one"], stdout=subprocess.PIPE) as done:
            assert done.stdout is not None
            assert done.stdout.fileno() > 1024
            assert answer_of(done) == b"one\n"
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_planners_process_is_ended_though_a_fork_holds_its_questions_open(monkeypatch):
    child.stop()
    monkeypatch.setattr(child, "PATIENCE", 0.2)
    deaf = subprocess.Popen(["sleep", "100"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child._running[:] = [deaf]
    child.stop()
    assert deaf.returncode == -signal.SIGKILL


def test_half_an_answer_of_a_renderer_that_was_killed_is_none(monkeypatch):
    said = '{"text": "ab{"ended": -9}'
    renderer = template_renderer._Renderer()
    renderer.child = subprocess.Popen(
        [sys.executable, "-S", "-c", f"input(); print({said!r}, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    monkeypatch.setattr(template_renderer, "subprocess", subprocess)
    assert renderer.ask({"seconds": 1.0}) == {"ended": -signal.SIGKILL}


def test_a_signal_for_a_process_that_has_ended_meanwhile_is_no_error():
    """It may come between the end of the process and this one's knowing of it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    came = []
    with stops_passed_on(SimpleNamespace(exitcode=None, pid=ended.pid), came):
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]
