"""A limit of time for code of someone else that runs in this process, such as a chat template's loops."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 0.2  # seconds between two looks at the clock


class TimeIsUp(Exception):
    """Raised inside a block that ran past its limit; the block's caller sees a ValueError."""


class _Watch:
    """One thread that interrupts those whose time is up; started when first needed, once in each process."""

    def __init__(self) -> None:
        self.lock, self.pid = threading.Lock(), 0
        self.until: dict[int, float] = {}  # by thread
        self.fired: set[int] = set()

    def start(self) -> None:
        if self.pid != os.getpid():  # a forked process has none of its parent's threads
            self.lock, self.pid = threading.Lock(), os.getpid()
            self.until, self.fired = {}, set()
            threading.Thread(target=self._look, daemon=True, name="time limit").start()

    def _look(self) -> None:
        while True:
            time.sleep(PAUSE)
            with self.lock:
                for thread in [thread for thread, until in self.until.items() if time.monotonic() > until]:
                    del self.until[thread]
                    self.fired.add(thread)
                    _interrupt(thread, TimeIsUp)


_watch = _Watch()


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error at its next bytecode; None takes back one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Interrupt the block when it takes longer; blocks inside of one count for the outer alone.

    Raises:
        ValueError: It did; says `message`.
    """
    _watch.start()
    thread = threading.get_ident()
    with _watch.lock:
        outer = thread in _watch.until
        if not outer:
            _watch.until[thread] = time.monotonic() + seconds
    if outer:
        yield
        return
    try:
        yield
    except BaseException:
        if not _ended(thread):
            raise
    else:
        if not _ended(thread):
            return
    raise ValueError(message)


def _ended(thread: int) -> bool:
    """Stop watching a thread; True where its time was up."""
    with _watch.lock:
        _watch.until.pop(thread, None)
        late = thread in _watch.fired
        _watch.fired.discard(thread)
        if late:
            _interrupt(thread, None)
    return late
