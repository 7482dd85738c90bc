"""What earlier tests of a worker left behind stays out of the garbage collections that end each training run."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _only_new_garbage() -> None:
    """Modules loaded on demand, reports and caches take a second of each run that comes after an hour of tests."""
    gc.collect()
    gc.freeze()
