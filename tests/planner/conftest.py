"""The planner's other process, forked: `ultralong.planner.traces.child` starts it as an interpreter of its own.

A test that asks for `fresh_child` has that one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import forked_planner

from ultralong.planner.traces import child

START = child.start


@pytest.fixture(scope="session", autouse=True)
def _forked_child() -> Iterator[None]:
    with forked_planner():
        yield


@pytest.fixture
def fresh_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`child` as it is, in a test of its start."""
    child.stop()
    monkeypatch.setattr(child, "start", START)
    yield
    child.stop()
