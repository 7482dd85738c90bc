"""Figures of rotary tables: wavelengths, the part of the circle a pair has seen, the speed a scaling leaves it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ultralong.figures.theme import (
    DASHES,
    GREY,
    MARKERS,
    PALETTE,
    graph_objects,
    level_line,
    log_axis,
    new_figure,
    tokens_label,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAIR_AXIS = "pair (fast to slow)"


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
    *,
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
    height: int = 360,
) -> Figure:
    """Curves over a common axis, distinguished by colour and dash.

    Args:
        curves: Name of the curve to its horizontal and vertical values.
        title: Title of the figure.
        x: Title of the horizontal axis, with its unit.
        y: Title of the vertical axis, with its unit.
        log_x: True for a logarithmic horizontal axis.
        log_y: True for a logarithmic vertical axis.
        markers: True marks each value, as measurements need.
        height: Height in pixels.
    """
    figure = new_figure(title, x, y, height=height)
    for index, (name, (across, up)) in enumerate(curves.items()):
        figure.add_trace(
            graph_objects().Scatter(
                x=list(across),
                y=_rounded(up),
                name=name,
                mode="lines+markers" if markers else "lines",
                line={"color": PALETTE[index % len(PALETTE)], "dash": DASHES[index % len(DASHES)], "width": 2},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            )
        )
    if log_x:
        figure.update_xaxes(log_axis([value for across, _ in curves.values() for value in across]))
    if log_y:
        figure.update_yaxes(log_axis([value for _, up in curves.values() for value in up]))
    figure.update_layout(showlegend=len(curves) > 1)
    return figure


def wavelengths(
    tables: Mapping[str, Sequence[float]],
    title: str = "",
    *,
    marks: Mapping[str, float] | None = None,
    longest: float | None = None,
    height: int = 380,
) -> Figure:
    """Tokens that each rotary pair needs for one full turn.

    Args:
        tables: Name of the table to its wavelengths in tokens, fastest pair first.
        title: Title of the figure.
        marks: Name to a length in tokens, drawn as a horizontal line: a pair above it never turns once within it.
        longest: Upper end of the axis in tokens, so that several figures can be compared; None fits the tables.
        height: Height in pixels.
    """
    figure = lines(
        {name: (range(len(values)), values) for name, values in tables.items()},
        title,
        x=PAIR_AXIS,
        y="tokens for one turn",
        log_y=True,
        height=height,
    )
    highest = longest or max(max(values) for values in tables.values())
    powers = range(0, math.ceil(math.log10(highest)) + 1, 2 if highest > 1e7 else 1)
    figure.update_yaxes(
        tickvals=[10**power for power in powers],
        ticktext=[_power_label(power) for power in powers],
        dtick=None,
        range=[0, math.log10(highest)] if longest else None,
    )
    for index, (name, length) in enumerate((marks or {}).items()):
        mark_height(figure, length, f"{name} {tokens_label(length)}", dash=("dash", "dot")[index % 2], log=True)
    return figure


def circle_seen(seen: Sequence[float], reached: Sequence[float], title: str = "", *, height: int = 320) -> Figure:
    """How much of its circle each pair covers in training, and what the new window adds that was never seen.

    Args:
        seen: For each pair the share of the circle (0 to 1) that positions of the trained window cover.
        reached: The same for the new window; never less.
        title: Title of the figure.
        height: Height in pixels.
    """
    figure = new_figure(title, PAIR_AXIS, "share of the circle", height=height)
    bar = graph_objects().Bar
    pairs = list(range(len(seen)))
    figure.add_trace(bar(x=pairs, y=_rounded(seen), name="seen in training", marker={"color": PALETTE[0]}))
    new = [max(after - before, 0.0) for before, after in zip(seen, reached, strict=True)]
    figure.add_trace(bar(x=pairs, y=_rounded(new), name="met for the first time", marker={"color": PALETTE[1]}))
    figure.update_layout(barmode="stack", showlegend=True, bargap=0.15)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return figure


def clock_hands(angles: Sequence[float], seen: Sequence[float], names: Sequence[str], title: str = "") -> Figure:
    """Pairs as hands of clocks, two rows of them: where each points, and the part of its circle that training showed.

    Args:
        angles: Angle of each pair, radians; 0 points up and angles grow clockwise.
        seen: Angle that each pair reached within the window of training, radians; a full turn or more is all of it.
        names: Name under each clock.
        title: Title of the figure.

    Raises:
        ValueError: Lists of different lengths.
    """
    if not len(angles) == len(seen) == len(names):
        raise ValueError(f"clock_hands() needs lists of one length: {len(angles)}, {len(seen)}, {len(names)}.")
    columns = -(-len(angles) // 2)
    figure = new_figure(title, "", "", height=320)
    centres = [(2.6 * (i % columns), -3.0 * (i // columns)) for i in range(len(angles))]
    drawn: dict[str, tuple[list[float | None], list[float | None]]] = {
        "circle": ([], []), "seen in training": ([], []), "hand": ([], [])
    }  # fmt: skip
    for (x, y), angle, reach in zip(centres, angles, seen, strict=True):
        for name, ends in (("circle", 2 * math.pi), ("seen in training", min(reach, 2 * math.pi))):
            arc = [ends * step / 14 for step in range(15)]
            drawn[name][0].extend([*(round(x + math.sin(a), 3) for a in arc), None])
            drawn[name][1].extend([*(round(y + math.cos(a), 3) for a in arc), None])
        drawn["hand"][0].extend([x, round(x + 0.9 * math.sin(angle), 3), None])
        drawn["hand"][1].extend([y, round(y + 0.9 * math.cos(angle), 3), None])
    widths = {"circle": (1, GREY), "seen in training": (5, PALETTE[0]), "hand": (3, PALETTE[1])}
    for name, (across, up) in drawn.items():
        width, colour = widths[name]
        figure.add_scatter(
            x=across, y=up, name=name, mode="lines", line={"width": width, "color": colour}, hoverinfo="skip",
            showlegend=name != "circle",
        )  # fmt: skip
    for (x, y), name in zip(centres, names, strict=True):
        figure.add_annotation(x=x, y=y - 1.45, text=name, showarrow=False, font={"size": 11, "color": GREY})
    figure.update_xaxes(range=[-1.3, 2.6 * columns - 1.3], visible=False)
    figure.update_yaxes(range=[-4.9, 1.3], visible=False, scaleanchor="x")
    return figure


def speed_kept(curves: Mapping[str, Sequence[float]], title: str = "", *, first: int = 0, height: int = 360) -> Figure:
    """The speed that a scaling leaves each pair, relative to the unscaled table: 1 at the top is untouched.

    Args:
        curves: Name of the scaling to its relative speeds, fastest pair first.
        title: Title of the figure.
        first: Index of the first pair given, where only a part of the table is shown.
        height: Height in pixels.
    """
    figure = lines(
        {name: (range(first, first + len(values)), values) for name, values in curves.items()},
        title,
        x=PAIR_AXIS,
        y="share of the frequency kept",
        log_y=True,
        markers=first > 0,
        height=height,
    )
    slowest = min(min(values) for values in curves.values())
    powers = range(0, math.ceil(-math.log2(slowest)), 1 if slowest > 0.05 else 2)
    steps = [step for step in (2.0**-power for power in powers) if step > 1.5 * slowest] + [slowest]
    figure.update_yaxes(tickvals=steps, ticktext=["1", *(f"1/{1 / step:.4g}" for step in steps[1:])], dtick=None)
    return figure


def mark_height(figure: Figure, value: float, text: str, *, dash: str = "dash", log: bool = False) -> None:
    """Draw a horizontal line with its name over a figure, in place.

    Args:
        figure: The figure.
        value: Where, in the units of the vertical axis.
        text: Its name, written above the line at its left end.
        dash: Plotly's name of the line style.
        log: True where the vertical axis is logarithmic.
    """
    figure.add_shape(level_line(value, dash=dash))
    figure.add_annotation(
        x=0.01,
        y=math.log10(value) if log else value,
        xref="x domain",
        yref="y",
        text=text,
        showarrow=False,
        xanchor="left",
        yanchor="bottom",
        font={"size": 11, "color": GREY},
    )


def _rounded(values: Sequence[float]) -> list[float]:
    """Four digits: what a screen can show, at a quarter of the bytes in the saved notebook."""
    return [float(f"{float(value):.4g}") for value in values]


def _power_label(power: int) -> str:
    if power < 3:
        return str(10**power)
    unit, name = (9, "B") if power >= 9 else (6, "M") if power >= 6 else (3, "k")
    return f"{10 ** (power - unit)}{name}"
