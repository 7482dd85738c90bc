"""An animation that needs no kernel: plotly frames with a slider and a Play button, and a filmstrip as its picture."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultralong.figures.panels import side_by_side
from ultralong.figures.show import MOST_STILLS, bundle, send
from ultralong.figures.theme import GREY, graph_objects
from ultralong.figures.typed_arrays import compact

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_FRAMES = 24
BELOW_AXES = 56  # pixels of tick labels and the axis title
CONTROLS = 104  # pixels of the slider with its labels, and of the button beside it
LEGEND = 30  # pixels of a legend of one line


def animated(frames: Sequence[Figure], titles: Sequence[str], *, milliseconds: int = 700) -> Figure:
    """One figure with a slider and a Play button that steps through several.

    Args:
        frames: Figures with one pair of axes, whose traces agree in number and type; axes are the first one's.
        titles: What the slider says at each frame.
        milliseconds: Time a frame stands while playing.

    Raises:
        ValueError: No frames, too many, another number of titles, or frames whose traces differ.
    """
    if not 0 < len(frames) <= MOST_FRAMES or len(frames) != len(titles):
        raise ValueError(
            f"play() takes 1 to {MOST_FRAMES} frames and as many titles, got {len(frames)} and {len(titles)}."
        )
    kinds = [[trace.type for trace in frame.data] for frame in frames]
    if differing := [title for kind, title in zip(kinds, titles, strict=True) if kind != kinds[0]]:
        raise ValueError(
            f"Frame {differing[0]!r} has other traces than the first one: draw all of them in every frame, "
            "empty ones too."
        )
    objects = graph_objects()
    figure = copy.deepcopy(frames[0])
    marks = [
        {
            "shapes": [shape.to_plotly_json() for shape in frame.layout.shapes],
            "annotations": [note.to_plotly_json() for note in frame.layout.annotations],
        }
        for frame in frames
    ]
    moving = any(each != marks[0] for each in marks)
    figure.frames = [
        objects.Frame(name=title, data=data, layout=around if moving else None)
        for title, data, around in zip(titles, _changing(frames), marks, strict=True)
    ]
    _add_controls(figure, titles, milliseconds)
    return figure


def _add_controls(figure: Figure, titles: Sequence[str], milliseconds: int) -> None:
    """The slider and the buttons, below the axes."""
    step = {"mode": "immediate", "frame": {"duration": milliseconds, "redraw": True}, "transition": {"duration": 0}}
    play = {"label": "Play", "method": "animate", "args": [None, step | {"fromcurrent": True}]}
    halt = {"label": "Stop", "method": "animate", "args": [[None], step | {"frame": {"duration": 0, "redraw": False}}]}
    # Below the axes, which keep their size: places are in shares of it, so that pixels are divided by it.
    height, top = figure.layout.height or 380, figure.layout.margin.t or 32
    axes = max(40, height - top - BELOW_AXES)
    added = CONTROLS + (LEGEND if _has_legend(figure) else 0)
    figure.update_layout(
        height=height + added,
        margin={"b": BELOW_AXES + added},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "buttons": [play, halt],
                "x": 0,
                "xanchor": "left",
                "y": -BELOW_AXES / axes,
                "yanchor": "top",
                "pad": {"t": 14},
                "font": {"color": GREY},
            }
        ],
        sliders=[
            {
                "active": 0,
                "x": 0.22,
                "len": 0.74,
                "y": -0.85 * BELOW_AXES / axes,
                "currentvalue": {"visible": True, "xanchor": "right"},
                "transition": {"duration": 0},  # or the handle glides for 150 ms behind the picture
                "steps": [{"label": title, "method": "animate", "args": [[title], step]} for title in titles],
            }
        ],
    )


def _has_legend(figure: Figure) -> bool:
    """Whether plotly draws a legend: asked for, or for several named traces of kinds that have one."""
    named = [trace for trace in figure.data if trace.type != "heatmap" and trace.name and trace.showlegend is not False]
    return bool(figure.layout.showlegend or (figure.layout.showlegend is None and len(named) > 1))


def _changing(frames: Sequence[Figure]) -> list[list[dict[str, Any]]]:
    """The traces of every frame without what is the same in all frames: plotly keeps what a frame leaves out."""
    every = [[trace.to_plotly_json() for trace in frame.data] for frame in frames]
    text = [
        [{key: json.dumps(value, default=list) for key, value in trace.items()} for trace in each] for each in every
    ]
    return [
        [
            {
                key: value
                for key, value in trace.items()
                if key == "type"
                or any(text[other][at].get(key) != text[number][at][key] for other in range(len(every)))
            }
            for at, trace in enumerate(each)
        ]
        for number, each in enumerate(every)
    ]


def play(
    frames: Sequence[Figure],
    titles: Sequence[str],
    alt: str,
    *,
    stills: Sequence[int] | None = None,
    milliseconds: int = 700,
) -> None:
    """Show an animation: with frames where scripts run (no kernel is needed), as a filmstrip where they do not.

    Args:
        frames: See `animated`.
        titles: See `animated`.
        alt: What is to be seen, in a sentence.
        stills: Indices of the filmstrip's frames; None takes up to four, spread over all.
        milliseconds: See `animated`.

    Raises:
        ValueError: See `animated`; or a still that is no frame, or an empty `alt`.
    """
    figure = animated(frames, titles, milliseconds=milliseconds)
    send(filmstrip_bundle(figure, frames, titles, alt, stills))


def filmstrip_bundle(
    figure: Figure, frames: Sequence[Figure], titles: Sequence[str], alt: str, stills: Sequence[int] | None
) -> dict[str, Any]:
    """The display bundle of an animation; its picture shows a few frames side by side."""
    if stills is None:
        count = min(MOST_STILLS, len(frames))
        stills = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    if not stills or not all(0 <= index < len(frames) for index in stills):
        raise ValueError(f"stills must be indices of the {len(frames)} frames, found {list(stills)}.")
    strip = side_by_side([frames[index] for index in stills], [titles[index] for index in stills])
    _once(strip, len(stills))
    content = bundle(strip, alt)
    content["application/vnd.plotly.v1+json"] = compact(json.loads(figure.to_json()))
    return content


def _once(strip: Figure, panels: int) -> None:
    """Panels that share their axes: one title below all of them, and the names of places at the left only."""
    if panels > 4:
        return
    for panel in range(panels):
        if panel != panels // 2:
            strip.update_xaxes(title_text="", row=1, col=panel + 1)
    axes = list(strip.select_yaxes())
    pinned = [(axis.range, axis.tickvals) for axis in axes]
    if pinned[0] != (None, None) and all(each == pinned[0] for each in pinned):
        for axis in axes[1:]:
            axis.showticklabels = False
