"""Figures of rotary tables hold the numbers they were given, at the places where they are read."""

import math

import pytest

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

from ultralong import figures
from ultralong.figures.rope import mark_height
from ultralong.figures.show import bundle

TABLE = [2 * math.pi * 10 ** (i / 4) for i in range(20)]


def test_wavelengths_hold_each_pair_and_mark_lengths_on_the_log_axis():
    figure = figures.wavelengths({"a": TABLE, "b": [2 * value for value in TABLE]}, marks={"window": 8192.0})
    assert list(figure.data[0].y) == pytest.approx(TABLE, rel=1e-3)
    assert list(figure.data[1].x) == list(range(20))
    assert figure.layout.shapes[0].y0 == 8192.0
    assert figure.layout.annotations[0].y == pytest.approx(math.log10(8192))
    assert figure.layout.annotations[0].text == "window 8K"
    assert figure.layout.yaxis.ticktext[:4] == ("1", "10", "100", "1k")
    assert figure.data[0].line.dash != figure.data[1].line.dash, "colour is never the only sign"
    pinned = figures.wavelengths({"a": TABLE}, longest=1e9)
    assert list(pinned.layout.yaxis.range) == [0, 9]
    assert pinned.layout.yaxis.ticktext[-1] == "100M"


def test_circle_seen_stacks_what_is_new_on_what_was_seen():
    figure = figures.circle_seen([1.0, 0.5, 0.1], [1.0, 1.0, 0.8])
    assert figure.layout.barmode == "stack"
    assert [list(bars.y) for bars in figure.data] == [[1.0, 0.5, 0.1], [0.0, 0.5, 0.7]]


def test_speed_kept_ends_its_axis_at_the_slowest():
    figure = figures.speed_kept({"yarn": [1.0, 0.5, 1 / 128]}, first=30)
    assert list(figure.data[0].x) == [30, 31, 32]
    assert figure.layout.yaxis.ticktext == ("1", "1/4", "1/16", "1/64", "1/128")
    assert figures.speed_kept({"all": [1 / 8, 1 / 8]}).layout.yaxis.ticktext == ("1", "1/2", "1/4", "1/8")


def test_a_logarithmic_axis_has_labels_that_can_be_told_apart():
    short = figures.lines({"a": ([16384, 131072], [0.4, 3.0])}, log_x=True, log_y=True).layout
    assert short.xaxis.ticktext == ("20k", "50k", "100k")
    assert short.yaxis.ticktext == ("0.5", "1", "2")
    assert short.xaxis.exponentformat is None
    long = figures.lines({"a": ([1, 2], [1e-16, 1.0])}, log_y=True).layout.yaxis
    assert (long.dtick, long.exponentformat) == (3, "power")


def test_lines_and_marks_draw_as_still_pictures():
    figure = figures.lines(
        {"one": ([1, 10], [0.5, 2.0]), "two": ([1, 10], [1.0, 1.5])},
        "title",
        x="x",
        y="y",
        log_x=True,
        log_y=True,
        markers=True,
    )
    mark_height(figure, 1.2, "here", log=True)
    for drawn in (
        figure,
        figures.wavelengths({"a": TABLE}),
        figures.circle_seen([0.5], [1.0]),
        figures.speed_kept({"a": [1.0, 0.25]}),
    ):
        assert bundle(drawn, "A sentence about it.")["image/png"].startswith(b"\x89PNG")
