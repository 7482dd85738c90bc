"""The planner's other process as `ultralong.planner.traces.child` starts it: an interpreter of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import START_PLANNER

from ultralong.planner.traces import child


@pytest.fixture
def fresh_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`child` as it is, in a test of its start."""
    child.stop()
    monkeypatch.setattr(child, "start", START_PLANNER)
    yield
    child.stop()
