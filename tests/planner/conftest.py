"""The planner's other process, forked: `ultralong.planner.traces.child` starts it as an interpreter of its own.

A test that asks for `fresh_child` has that one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import IO, Any

import pytest

from ultralong.planner.traces import child

START = child.start


class ForkedChild:
    """What `child` uses of a `subprocess.Popen`."""

    def __init__(self) -> None:
        asked, self.stdin = self._pipe()
        answered = self._pipe()
        self.stdout = answered[0]
        ours = (self.stdin, self.stdout)
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(asked, answered[1], ours), daemon=True
        )
        self._process.start()
        asked.close()
        answered[1].close()

    @staticmethod
    def _pipe() -> tuple[IO[str], IO[str]]:
        reader, writer = os.pipe()
        return os.fdopen(reader, "r"), os.fdopen(writer, "w")

    @staticmethod
    def _serve(asked: IO[str], answers: IO[str], ours: tuple[IO[str], ...]) -> None:
        for stream in ours:  # the questions end when the last one who can write them has closed them
            stream.close()
        os.dup2(asked.fileno(), 0)
        os.dup2(answers.fileno(), 1)
        child.sys.stdin = os.fdopen(0, closefd=False)
        child.main()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _start() -> Any:
    if not child._running or child._running[0].poll() is not None:
        child._running[:] = [ForkedChild()]
    return child._running[0]


@pytest.fixture(scope="session", autouse=True)
def _forked_child() -> Iterator[None]:
    child.start = _start
    yield
    child.stop()
    child.start = START


@pytest.fixture
def fresh_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`child` as it is, in a test of its start."""
    child.stop()
    monkeypatch.setattr(child, "start", START)
    yield
    child.stop()
