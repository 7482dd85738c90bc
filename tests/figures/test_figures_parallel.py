"""Figures of several ranks say what they were given, and have a still picture."""

from __future__ import annotations

import pytest

from ultralong.figures import png_bytes
from ultralong.figures.parallel import rank_timeline, shares_of_one, token_ownership, traffic, work_of_ranks


def test_a_strip_of_tokens_is_numbered_by_rank_where_numbers_fit():
    small = token_ownership({"contiguous": [0, 0, 1, 1], "zigzag": [0, 1, 1, 0]}, ranks=2)
    assert list(map(list, small.data[0].text)) == [["0", "0", "1", "1"], ["0", "1", "1", "0"]]
    large = token_ownership({f"head {h}": [h] * 100 for h in range(8)}, ranks=8)
    assert [line.index(str(head)) for head, line in enumerate(large.data[0].text)] == [49] * 8, (
        "one number in the middle"
    )
    halves = token_ownership({"a": [0] * 60 + [1] * 40, **{c: [2] * 100 for c in "bcd"}}, ranks=3).data[0].text[0]
    assert [(at, text) for at, text in enumerate(halves) if text] == [(29, "0"), (79, "1")]
    assert large.data[0].zmax == 7


def test_waiting_is_written_out():
    figure = rank_timeline([[10, 0], [10, 16]])
    assert list(map(list, figure.data[0].text)) == [["10", "waits"], ["10", "16"]]


@pytest.mark.parametrize("figure", [
    work_of_ranks([1, 2, 3], "work", most=4),
    traffic([[0, 5], [7, 0]], "sent"),
    shares_of_one({"flash4": {"ring": 0.98}, "cudnn": {"ring": 1.0}}, "rates"),
    token_ownership({"one": [0, 0]}, ranks=1),
])  # fmt: skip
def test_each_has_a_picture(figure):
    assert png_bytes(figure).startswith(b"\x89PNG")
