"""Rows that come in several parts, against the same steps in a whole tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultralong.attention.lse_merge import PartialRows

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
@given(
    parts=st.lists(st.tuples(inside(), st.booleans()), max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_what_is_added_or_put_is_in_the_whole(parts, dtype):
    own = numbers(2, 20, 3, 4, dtype=torch.float32)
    total, kept = own.clone(), PartialRows(own, ROWS, dtype)
    for rows, put in parts:
        part = numbers(2, rows.stop - rows.start, 3, 4, dtype=dtype)
        assert torch.equal(kept.at(rows), total[:, rows].to(dtype))
        if put:
            kept.set(rows, part)
            total[:, rows] = part
        else:
            kept.at(rows).add_(part)
            total[:, rows] += part
    assert torch.equal(kept.result(), total)


def test_a_part_of_all_rows_needs_no_copy():
    parts, part = PartialRows(torch.zeros(1, 5, 1, 1), [slice(0, 5)], torch.float32), torch.ones(1, 5, 1, 1)
    parts.set(slice(0, 5), part)
    assert parts.result() is part


def test_rows_that_are_not_held_are_named():
    with pytest.raises(LookupError, match="rows 6 to 8 are not among"):
        PartialRows(torch.zeros(1, 20, 1, 1), ROWS, torch.float32).at(slice(6, 8))
