"""Stacked bytes, prompts as pages, and estimates with intervals say what they were given, and have a still picture."""

from __future__ import annotations

import pytest

from ultralong.figures import png_bytes, side_by_side
from ultralong.figures.memory import stacked_bytes
from ultralong.figures.samples import forest, sample_map


def test_parts_of_a_bar_are_stacked_and_a_missing_one_is_zero():
    figure = stacked_bytes({"one": {"states": 3.0, "inputs": 1.0}, "two": {"states": 2.0}}, limit=10, limit_name="GPU")
    assert {trace.name: list(trace.y) for trace in figure.data} == {"states": [3.0, 2.0], "inputs": [1.0, 0.0]}
    assert figure.layout.barmode == "stack"
    assert figure.layout.yaxis.range[1] > 10, "the limit is inside of the picture"
    both = side_by_side([figure, figure], ["a", "b"])
    assert both.layout.barmode == "stack"
    assert [note.text for note in both.layout.annotations].count("GPU") == 1, "one name, beside the last panel"
    assert both.layout.margin.r >= figure.layout.margin.r > 24, "the limit's name beside the last panel is cut off"


def test_of_many_bars_some_are_named_each_by_its_own_name():
    """Bars named by falling numbers: on an axis of categories plotly would take a place for a name."""
    figure = stacked_bytes({str(layer): {"inputs": layer} for layer in reversed(range(32))})
    named = dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True))
    assert list(named) == list(range(0, 32, 6))
    height = dict(zip(figure.data[0].x, figure.data[0].y, strict=True))
    assert all(height[place] == float(name) for place, name in named.items())
    assert figure.layout.xaxis.type != "category"


def test_a_prompt_is_a_page_with_its_needle_and_its_end():
    (trace,) = sample_map(130, [70], most=200).data
    cells = [cell for line in trace.z for cell in line]
    assert len(cells) == 224, "whole lines of 32 cells"
    assert cells[69:72] == [0, 1, 0]
    assert cells[128:131] == [0, 2, None]
    (whole,) = sample_map(64, [], everything=True).data
    assert whole.z[0].count(1) == 32
    (large,) = sample_map(2048, [1000]).data
    assert large.z[1000 // 4 // 32][1000 // 4 % 32] == 1, "a cell is four tokens"
    assert len(large.z) == 16


def test_a_forest_has_a_line_and_a_point_for_each_row():
    figure = forest({"a < b": (1.0, 0.5, 1.5), "c": (-1.0, -2.0, 0.0)}, zero=0.0, span=(-3, 3))
    lines, points = figure.data
    assert lines.x == (0.5, 1.5, None, -2.0, 0.0, None)
    assert (points.x, points.y) == ((1.0, -1.0), (0, 1))
    assert figure.layout.yaxis.ticktext == ("a &lt; b", "c")
    low, high = figure.layout.xaxis.range
    assert low < -3, "a line that stops at the frame looks cut off"
    assert high > 3


@pytest.mark.parametrize(
    "figure",
    [
        stacked_bytes({"one": {"states": 3.0}}, "bytes", limit=2, limit_name="GPU"),
        sample_map(300, [10, 200], "a prompt"),
        forest({"a": (1.0, 0.5, 1.5)}, "estimates", x="points", zero=0.0),
    ],
)
def test_each_has_a_picture(figure):
    assert png_bytes(figure).startswith(b"\x89PNG")
