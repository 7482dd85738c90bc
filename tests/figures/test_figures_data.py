"""Figures of packing say what the data says, and have a still picture."""

import numpy as np
import pytest

from ultralong import figures


def test_attention_stays_inside_a_document_only_when_masked():
    for masked in (False, True):
        cells = np.array(figures.attention_mask([0, 3, 5], masked).data[0].z)
        assert (np.triu(cells, 1) == 0).all(), "no token sees the future"
        assert (cells[np.tril_indices(3)] == 1).all()
        assert (cells[3:, :3] == (0 if masked else 0.5)).all()
    with pytest.raises(ValueError, match="rise from 0"):
        figures.attention_mask([1, 2], True)


def test_a_token_table_colours_by_document():
    lines = {"input": ["a", "b", "c"], "label": ["b", "c", "-"]}
    figure = figures.token_table(lines, {"input": [7, 7, 9], "label": [7, 9, -1]})
    assert [list(row) for row in figure.data[0].text] == list(lines.values())
    shade = [list(row) for row in figure.data[0].z]
    assert shade == [[0, 0, 1], [0, 1, 0.5]]
    assert figures.png_bytes(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="one length"):
        figures.token_table({"a": ["x"]}, {"a": [1, 2]})


def test_length_buckets_need_a_number_for_each():
    figure = figures.length_buckets([4096, 8192], {"before": [1, 2, 3], "after": [0, 2, 6]})
    assert list(figure.data[0].x) == ["< 4K", "4K - 8K", "> 8K"]
    assert figures.png_bytes(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 numbers for 3 buckets"):
        figures.length_buckets([4096, 8192], {"before": [1, 2]})


def test_shares_keep_a_colour_for_each_part():
    figure = figures.shares({"padded": {"text": 3, "padding": 5}, "packed": {"text": 8}})
    assert [(trace.name, list(trace.x)) for trace in figure.data] == [("text", [3, 8]), ("padding", [5, 0.0])]
    assert figure.layout.barmode == "stack"
    assert figures.png_bytes(figure).startswith(b"\x89PNG")
