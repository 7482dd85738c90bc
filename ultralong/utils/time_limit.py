"""A limit of time and memory for code of someone else that runs in this process, such as a chat template's loops."""

from __future__ import annotations

import ctypes
import math
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
        self.until: dict[int, tuple[float, float]] = {}  # by thread: its time, and the process's bytes
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
                now, used = time.monotonic(), resident_bytes() if self.until else 0
                for thread in [thread for thread, (until, most) in self.until.items() if now > until or used > most]:
                    del self.until[thread]
                    self.fired.add(thread)
                    _interrupt(thread, TimeIsUp)


_watch = _Watch()


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error at its next bytecode; None takes back one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


def resident_bytes() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def time_limit(seconds: float, message: str, memory: float = math.inf) -> Iterator[None]:
    """Interrupt the block when it takes longer; blocks inside of one count for the outer alone.

    Args:
        seconds: The block's time.
        message: What the error says.
        memory: Bytes by which the whole process may grow meanwhile; looked at five times a second, and one operation
            is never cut in two.

    Raises:
        ValueError: It did; says `message`.
    """
    _watch.start()
    thread = threading.get_ident()
    with _watch.lock:
        outer = thread in _watch.until
        if not outer:
            _watch.until[thread] = (time.monotonic() + seconds, resident_bytes() + memory)
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
