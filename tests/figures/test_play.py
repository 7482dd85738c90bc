"""Animations: frames that need no kernel, and a filmstrip where no script runs."""

from __future__ import annotations

import json

import pytest

from ultralong import figures
from ultralong.figures.play import LEGEND, animated, filmstrip_bundle
from ultralong.figures.show import LEGEND_ROW, plotly_json


def bars(values):
    figure = figures.new_figure("work", x="rank", y="pairs")
    figure.add_bar(x=list(range(len(values))), y=values, name="work")
    return figure


FRAMES = [bars([step, 2 * step, 3]) for step in range(6)]
TITLES = [f"hop {step}" for step in range(6)]


def test_every_frame_is_a_step_of_the_slider():
    figure = animated(FRAMES, TITLES)
    assert [frame.name for frame in figure.frames] == TITLES
    assert [step.label for step in figure.layout.sliders[0].steps] == TITLES
    assert figure.layout.sliders[0].transition.duration == 0, "the handle glides behind the picture"
    assert list(figure.frames[4].data[0].y) == [4, 8, 3]
    assert not FRAMES[0].frames, "the first figure was changed"


def test_the_bundle_holds_frames_and_a_picture_of_a_few():
    content = filmstrip_bundle(animated(FRAMES, TITLES), FRAMES, TITLES, "Bars grow from hop to hop.", None)
    assert content["image/png"].startswith(b"\x89PNG")
    assert len(content["application/vnd.plotly.v1+json"]["frames"]) == 6
    assert len(json.dumps(content["application/vnd.plotly.v1+json"])) < 30_000
    assert content["text/plain"] == "Bars grow from hop to hop."


def test_what_can_not_be_played_is_refused():
    with pytest.raises(ValueError, match="as many titles"):
        animated(FRAMES, TITLES[:2])
    other = bars([1, 2, 3])
    other.add_scatter(x=[0], y=[0])
    with pytest.raises(ValueError, match="'b' has other traces"):
        animated([FRAMES[0], other], ["a", "b"])
    with pytest.raises(ValueError, match="indices of the 6 frames"):
        filmstrip_bundle(animated(FRAMES, TITLES), FRAMES, TITLES, "Bars.", [9])


@pytest.mark.parametrize("height", [240, 360, 520])
def test_slider_and_legend_have_places_of_their_own_at_any_height(height):
    frames = [figures.lines({"one": ([0, 1], [0, end]), "two": ([0, 1], [end, 0])}, height=height) for end in (1, 2)]
    layout = animated(frames, ["short", "long"]).layout
    axes = layout.height - layout.margin.t - layout.margin.b
    assert axes == height - frames[0].layout.margin.t - frames[0].layout.margin.b, "the axes lost room"
    slider, legend = -layout.sliders[0].y * axes, layout.margin.b - LEGEND  # below the axes, in pixels
    assert (layout.legend.yref, layout.legend.yanchor, layout.legend.y) == ("container", "bottom", 0)
    assert slider > 40, "the slider stands on the axis title"
    assert legend > slider + 100, "the legend stands on the slider's labels"
    still = plotly_json(frames[0])["layout"]
    assert still["margin"]["b"] == frames[0].layout.margin.b + LEGEND_ROW, "no room below the axis title"
    assert still["height"] == height + LEGEND_ROW, "the axes lost room to the legend"
    assert animated([figures.attention_mask([0, 4], True)], ["alone"]).layout.margin.b < layout.margin.b
