"""The shuffle without memory is a permutation, depends on the seed, and can be asked anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.data.rows.permutation import permuted


@given(size=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70))
def test_every_place_occurs_once(size, seed):
    places = permuted(np.arange(size), size, seed)
    assert np.array_equal(np.sort(places), np.arange(size))


@given(size=st.integers(1, 2**50), seed=st.integers(0, 2**32), data=st.data())
def test_a_place_does_not_depend_on_what_else_is_asked(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permuted(index, size, seed)
    assert np.array_equal(together, [permuted(np.array(one), size, seed) for one in index])
    assert ((together >= 0) & (together < size)).all()


def test_seeds_give_different_orders_that_look_random():
    size = 10_000
    first, second = permuted(np.arange(size), size, 0), permuted(np.arange(size), size, 1)
    assert (first == second).mean() < 0.005
    # Neighbours in the store are not neighbours in the order: the mean distance of a random order is size / 3.
    assert abs(np.abs(np.diff(first)).mean() / (size / 3) - 1) < 0.05
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.4"):
        permuted(np.array([5]), 5, 0)
