"""Rows that several parts add up to, against the same sums in a whole tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultralong.attention.parts import Parts

ROWS = [slice(2, 7), slice(9, 10), slice(12, 20)]


@st.composite
def inside(draw):
    """A part of one of the ranges, or all of it."""
    place = draw(st.sampled_from(ROWS))
    start = draw(st.integers(place.start, place.stop - 1))
    return draw(st.sampled_from([place, slice(start, draw(st.integers(start + 1, place.stop)))]))


def numbers(*sizes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(-99, 99, sizes).to(dtype)  # so that sums are exact


@settings(max_examples=200, deadline=None)
@given(added=st.lists(inside(), max_size=6), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_parts_and_a_ranks_own_add_up(added, dtype):
    own, parts = numbers(2, 20, 3, 4, dtype=torch.float32), Parts(ROWS, dtype)
    total = own.clone()
    for rows in added:
        part = numbers(2, rows.stop - rows.start, 3, 4, dtype=torch.float32)
        total[:, rows] += part
        parts.add(rows, part)
    parts.add_own(own.clone())
    assert torch.equal(parts.write(own.clone()), total)


@settings(max_examples=200, deadline=None)
@given(put=st.lists(inside(), max_size=6), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_what_is_put_replaces_what_was_there(put, dtype):
    own, parts = numbers(2, 20, 3, 4, dtype=torch.float32), Parts(ROWS, dtype)
    total = own.clone()
    parts.start(own)
    for rows in put:
        assert torch.equal(parts.at(rows), total[:, rows].to(dtype))
        part = numbers(2, rows.stop - rows.start, 3, 4, dtype=dtype)
        total[:, rows] = part
        parts.put(rows, part)
    assert torch.equal(parts.write(own), total)


def test_parts_of_all_rows_need_no_copy():
    parts, part = Parts([slice(0, 5)], torch.float32), torch.ones(1, 5, 1, 1)
    parts.start(torch.zeros(1, 5, 1, 1))
    parts.put(slice(0, 5), part)
    assert parts.write(torch.zeros(1, 5, 1, 1)) is part


def test_rows_that_are_not_held_are_named():
    with pytest.raises(LookupError, match="rows 6 to 8 are not among"):
        Parts(ROWS, torch.float32).at(slice(6, 8))
