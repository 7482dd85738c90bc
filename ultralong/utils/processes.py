"""Processes and their signals: no child outlives its parent, a failure is told once, a stop is noted between rounds."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h
LOOK = 0.5  # seconds between two looks at whether a process lives


def end_with_parent(parent: int | None = None, how: signal.Signals = signal.SIGKILL) -> None:
    """Have this process receive a signal when the one that started it ends, by whatever cause. Linux only.

    Args:
        parent: Process id of the one that started this one. If it has ended by now the signal comes at once; with None
            an end before this call goes unnoticed.
        how: The signal. SIGKILL suits a process that has nothing to clean up.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, how)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), how)


_keeps_imports = False


def keep_imports() -> None:
    """Say that this process is a command's own: what it imports `without_collections` stays out of all later ones."""
    global _keeps_imports
    _keeps_imports = True


@contextmanager
def without_collections() -> Iterator[None]:
    """For imports of torch and transformers: a million objects that stay, each looked through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if _keeps_imports:
                gc.freeze()
            gc.enable()


def start_method() -> str:
    """How a process that computes with torch is started: "fork", which is at once; "spawn" where there is a GPU.

    A forked process can't use CUDA, and what this one holds on a GPU would be counted as its own.
    """
    import torch

    return "spawn" if torch.cuda.is_available() else "fork"


class WorkerPool(ProcessPoolExecutor):
    """Fresh processes that end with this one and hear no Ctrl-C: it is this one that stops, and says so once.

    A terminal sends Ctrl-C to all of them, and one that is still importing would print where it was.

    Args:
        workers: Most processes at once.
        prepare: What each does first, with `given`; of a module that it can import.
        given: See `prepare`.
    """

    def __init__(self, workers: int, prepare: Callable[..., None] | None = None, *given: Any) -> None:
        # Not forked: this process may hold a GPU, or a tokenizer's threads, which a fork could not use or let go.
        starts: Any = (os.getpid(), prepare, _Kept(given) if sys.platform == "linux" else given)
        super().__init__(workers, get_context("spawn"), _prepare_worker, starts)
        self._watched = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of any executor; see `result_of`. Processes are started here, and keep what signals were blocked.

        Raises:
            WorkerKilled: One of its processes was killed.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            future = super().submit(fn, *args, **kwargs)
            if not self._watched:
                both: Any = (self._processes, self._result_queue)  # which Python's own class gives no name to
                threading.Thread(target=_end_together, args=both, daemon=True).start()
                self._watched = True
            return future
        except BrokenProcessPool as error:
            raise WorkerKilled from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Killed(RuntimeError):
    """A process that worked for this one was killed from outside; the message says what to do."""


class WorkerKilled(Killed):
    """A process of a pool was killed."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, often because the host ran out of memory. Run the same again, with fewer "
            "workers if it was the memory."
        )


def result_of(future: Future[Any]) -> Any:
    """What a `WorkerPool` computed.

    Raises:
        WorkerKilled: One of its processes was killed.
        Exception: What the work raised.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WorkerKilled from error


def _end_together(processes: dict[int, Any], results: Any) -> None:
    """End all processes of a pool when one was killed.

    One that is killed while it sends leaves the pool waiting for the rest, and the others for their turn: all of them
    hold the same pipe open, and so does this process. When they are gone it ends, and the pool says that it is broken.
    """
    alive = [*processes.values()]
    while alive:
        time.sleep(LOOK)
        if any(process.exitcode for process in [*processes.values()]):
            for process in [*processes.values()]:
                process.kill()
            for process in [*processes.values()]:
                process.join()
            results._writer.close()
            return
        alive = [process for process in [*processes.values()] if process.exitcode is None]


def answer_of(child: Any, seconds: float = float("inf")) -> Any:
    """A line that another process writes; empty where it has ended, or taken so long, without one.

    The pipe's end does not say that it has ended: a process that was forked meanwhile may hold it open.

    Args:
        child: A `Popen` with a pipe for its output, of which every line was read.
        seconds: That it may take.
    """
    until = time.monotonic() + seconds
    while os.name == "posix":  # elsewhere there are no forks, and pipes can't be waited for
        lives = child.poll() is None  # before the look: what it wrote till it ended is there then
        if wait([child.stdout], LOOK if lives else 0):
            break
        if not lives or time.monotonic() > until:
            return ""
    return child.stdout.readline()


class _Kept:
    """Values for processes that this one starts, in a file of memory, which is gone when this one is, however it ends.

    What a process is started with goes through a pipe that this one holds open too: it would wait for ever to write
    more than a pipe holds to one that was killed before it read.
    """

    def __init__(self, values: tuple[Any, ...]) -> None:
        number = os.memfd_create("ultralong")
        with open(number, "wb", closefd=False) as file:
            pickle.dump(values, file)
        self.name = f"/proc/{os.getpid()}/fd/{number}"
        weakref.finalize(self, os.close, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_kept, (self.name,)


def _read_kept(name: str) -> Any:
    with open(name, "rb") as file:
        return pickle.load(file)  # noqa: S301 - of the process that started this one


def _prepare_worker(parent: int, prepare: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    end_with_parent(parent)
    if prepare is not None:
        prepare(*given)


class ChildFailed(RuntimeError):
    """Processes that this one started failed; their message went to standard error. `code` is their exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


STOPS = ("SIGTERM", "SIGUSR1")  # signals that ask a process to stop
SERVICE_STOPS = (signal.SIGINT, signal.SIGTERM)  # those that ask a server to


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """Note SIGTERM and SIGUSR1, which ask a process to stop, for a loop that looks between two of its rounds.

    Signals that the caller handles or ignores stay as they are, and so do all outside of the main thread, where no
    handler can be set. A further signal changes nothing: a scheduler, torchrun's agent and a script may each send one
    for the same stop. A process that waits for another one in vain does not come to look; what ends it is the SIGKILL
    that torchrun sends after its shutdown timeout of 30 seconds, and schedulers after their own.

    Yields:
        The numbers of the signals that came, the first one first.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    numbers = [signal.Signals[name] for name in STOPS if main and hasattr(signal, name)]
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def leave_stops_to_first(rank: int) -> None:
    """Have the first of several processes hear what asks a server to stop, and the others wait for it to end them."""
    if rank:
        for number in SERVICE_STOPS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def stops_passed_on(process: Any, came: list[int]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to a process, and go on; outside of the main thread nothing is passed on.

    A second SIGINT kills it: the process can't tell that from the first one, come to it by two ways.

    Args:
        process: The `multiprocessing.Process`.
        came: Takes the numbers of the signals, for the caller to do as they ask when the process has ended.
    """

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if process.exitcode is None:
            at_once = came.count(signal.SIGINT) > 1
            with suppress(ProcessLookupError):  # it ended, and this signal came while that was being read
                os.kill(process.pid, signal.SIGKILL if at_once else number)

    main = threading.current_thread() is threading.main_thread()
    # One that is ignored, as under nohup, stays so.
    heard = [number for number in SERVICE_STOPS if main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
