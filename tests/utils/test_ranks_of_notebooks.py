"""Ranks that run a function of a notebook cell, on a machine whose ranks are spawned."""

import builtins
import subprocess
import sys

import pytest

from ultralong.utils import local_ranks

# `python -c` has a `__main__` without a file, as a notebook's kernel has; a child can import nothing from it.
CELL = """
from ultralong.utils import local_ranks

FACTOR = 7

def tripled(number):
    return 3 * number

def cell(rank, world, other):
    return rank + world * FACTOR + other(5)

local_ranks.start_method = lambda: "spawn"
assert local_ranks.run_ranks(cell, 1, tripled) == [22]
"""


def test_a_cells_function_and_what_it_uses_travel_by_value():
    done = subprocess.run([sys.executable, "-c", CELL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_cloudpickle_it_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest):
        if name == "cloudpickle":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(local_ranks, "start_method", lambda: "spawn")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(ValueError, match="pip install cloudpickle"):
        local_ranks.run_ranks(print, 1)
