"""How one plotly trace becomes matplotlib marks. Used by `static.draw`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.figures.theme import PALETTE
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as StaticFigure
    from plotly.graph_objects import Figure

POINTS_PER_PIXEL = 0.75
LINE_STYLES = {"dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3)), "longdashdot": (0, (8, 3, 2, 3))}
MARKER_STYLES = {
    "circle": "o",
    "circle-open": "o",
    "square": "s",
    "square-open": "s",
    "diamond": "D",
    "diamond-open": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "x": "X",
    "cross": "P",
    "star": "*",
    "x-thin": "x",
    "x-thin-open": "x",
    "line-ns": "|",
    "line-ns-open": "|",
}


@dataclass
class Panel:
    """One pair of axes and what has been drawn on it so far, which later traces must know.

    Attributes:
        axes: The matplotlib axes.
        places: For each direction, the place of every category seen.
        bars: How many bar traces were drawn, for bars side by side.
        tops: Where the bars drawn so far end, for stacked bars.
    """

    axes: Axes
    places: dict[str, dict[str, int]] = field(default_factory=lambda: {"x": {}, "y": {}})
    bars: int = 0
    tops: dict[float, float] = field(default_factory=dict)


def rgba(colour: str) -> Any:
    """A plotly colour (`#rrggbb`, `rgb(...)`, `rgba(...)`, or a CSS name) as matplotlib takes it."""
    match = re.fullmatch(r"rgba?\(([^)]*)\)", colour.strip())
    if not match:
        return colour
    numbers = [float(part) for part in match.group(1).split(",")]
    return (*(value / 255 for value in numbers[:3]), numbers[3] if len(numbers) == 4 else 1.0)


def number_format(specification: str) -> Any:
    """Tick labels for the number formats of plotly that Python writes in the same way: `.0%`, `.2f`, `,`, `,.1f`.

    Raises:
        ValueError: Another format.
    """
    if not re.fullmatch(r",?(\.\d+[f%e])?", specification):
        raise ValueError(
            f"Cannot draw tickformat {specification!r} as a still picture: use one like '.0%', '.2f' or ','."
        )
    python = ",.0f" if specification == "," else specification
    return require("matplotlib.ticker", "notebooks").FuncFormatter(lambda value, _: format(value, python))


def draw_trace(canvas: StaticFigure, panel: Panel, trace: Any, index: int, figure: Figure) -> None:
    """Draw one trace on its panel.

    Args:
        canvas: The whole picture, which a colour bar needs.
        panel: Panel to draw on.
        trace: A plotly scatter, bar or heatmap trace.
        index: Its place among the traces, which picks its default colour.
        figure: The figure it belongs to, for `barmode` and the other bars.
    """
    if trace.type == "scatter":
        _scatter(panel, trace, index)
    elif trace.type == "bar":
        _bar(panel, trace, index, figure)
    else:
        _heatmap(canvas, panel, trace)


def _values(panel: Panel, data: Any, direction: str, count: int = 0) -> np.ndarray:
    """Numbers for one coordinate. Strings become category places, labelled on the axis in order of appearance."""
    if data is None:
        return np.arange(count, dtype=float)
    items = list(data)
    if not any(isinstance(item, str) for item in items):
        return np.asarray([np.nan if item is None else item for item in items], dtype=float)
    places = panel.places[direction]
    numbers = np.asarray([places.setdefault(str(item), len(places)) for item in items], dtype=float)
    (panel.axes.set_xticks if direction == "x" else panel.axes.set_yticks)(list(places.values()), list(places))
    return numbers


def _scatter(panel: Panel, trace: Any, index: int) -> None:
    y = _values(panel, trace.y, "y")
    x = _values(panel, trace.x, "x", len(y))
    mode = trace.mode or "lines"
    colour = rgba(
        trace.line.color
        or (trace.marker.color if isinstance(trace.marker.color, str) else None)
        or PALETTE[index % len(PALETTE)]
    )
    alpha = trace.opacity
    if trace.fill in ("toself", "tozeroy", "tonexty"):
        _fill(panel, trace, x, y, colour)
    label = trace.name if trace.showlegend is not False and trace.name else None
    if label is not None and label.startswith("_"):
        label = f" {label}"  # matplotlib leaves names with a leading underscore out of a legend
    width = (2 if trace.line.width is None else trace.line.width) * POINTS_PER_PIXEL
    if "lines" in mode and width:
        panel.axes.plot(
            x,
            y,
            color=colour,
            alpha=alpha,
            linewidth=width,
            label=label,
            linestyle=LINE_STYLES.get(trace.line.dash, "-"),
            drawstyle={"hv": "steps-post", "vh": "steps-pre"}.get(trace.line.shape, "default"),
            **(_marker(trace, colour) if "markers" in mode else {}),
        )
    elif "markers" in mode:
        _points(panel, trace, x, y, colour, alpha, label)
    if "text" in mode and trace.text is not None:
        texts = [trace.text] * len(x) if isinstance(trace.text, str) else trace.text
        for px, py, text in zip(x, y, texts, strict=True):
            panel.axes.annotate(str(text), (px, py), xytext=(0, 4), textcoords="offset points", ha="center", size=9)
    if trace.error_y.array is not None:
        low = trace.error_y.array if trace.error_y.arrayminus is None else trace.error_y.arrayminus
        reach = np.abs(np.asarray([low, trace.error_y.array], float))
        panel.axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=1, capsize=2)


def _marker(trace: Any, colour: Any) -> dict[str, Any]:
    symbol = trace.marker.symbol if isinstance(trace.marker.symbol, str) else "circle"
    size = trace.marker.size if isinstance(trace.marker.size, (int, float)) else 6
    return {
        "marker": MARKER_STYLES.get(symbol, "o"),
        "markersize": size * POINTS_PER_PIXEL,
        "markerfacecolor": "none" if symbol.endswith("-open") else colour,
    }


def _points(
    panel: Panel, trace: Any, x: np.ndarray, y: np.ndarray, colour: Any, alpha: float | None, label: str | None
) -> None:
    given = trace.marker.color
    style = _marker(trace, colour)
    sizes = np.asarray(6 if trace.marker.size is None else trace.marker.size, dtype=float) * POINTS_PER_PIXEL
    options: dict[str, Any] = {"c": [colour]}
    if given is not None and not isinstance(given, str):
        strings = any(isinstance(value, str) for value in given)
        options = {"c": [rgba(value) for value in given] if strings else np.asarray(given, float)}
        if not strings and trace.marker.colorscale is not None:
            options["cmap"] = _colour_map(trace.marker.colorscale)
    panel.axes.scatter(x, y, s=sizes**2, marker=style["marker"], alpha=alpha, label=label, linewidths=0.8, **options)


def _fill(panel: Panel, trace: Any, x: np.ndarray, y: np.ndarray, colour: Any) -> None:
    colours = require("matplotlib.colors", "notebooks")
    fill = rgba(trace.fillcolor) if trace.fillcolor else colours.to_rgba(colour, 0.3)
    if trace.fill == "toself":
        panel.axes.fill(x, y, color=fill, linewidth=0)
    elif trace.fill == "tozeroy":
        panel.axes.fill_between(x, 0, y, color=fill, linewidth=0)
    else:
        raise ValueError(
            "Cannot draw fill='tonexty' as a still picture: give the band as one closed trace with fill='toself'."
        )


def _bar_places(panel: Panel, trace: Any, place: np.ndarray, figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """Centres and thickness of one trace's bars; traces share each place unless they are stacked or overlaid."""
    step = float(np.min(np.diff(np.unique(place)))) if len(np.unique(place)) > 1 else 1.0
    groups = 1
    if figure.layout.barmode not in ("stack", "relative", "overlay"):
        groups = sum(
            other.type == "bar" and (other.xaxis, other.yaxis) == (trace.xaxis, trace.yaxis) for other in figure.data
        )
    share = 0.8 * step / groups
    centre = place + (panel.bars - (groups - 1) / 2) * share if groups > 1 else place
    panel.bars += 1
    return centre, np.asarray(share if trace.width is None else trace.width, float)


def _bar(panel: Panel, trace: Any, index: int, figure: Figure) -> None:
    horizontal = trace.orientation == "h"
    along, across = ("x", "y") if horizontal else ("y", "x")
    length = _values(panel, trace[along], along)
    place = _values(panel, trace[across], across, len(length))
    centre, thickness = _bar_places(panel, trace, place, figure)
    base = np.broadcast_to(np.asarray(0.0 if trace.base is None else trace.base, float), length.shape)
    if figure.layout.barmode in ("stack", "relative") and trace.base is None:
        base = np.asarray([panel.tops.get(value, 0.0) for value in place])
        panel.tops.update(zip(place, base + length, strict=True))
    given = trace.marker.color
    colour = (
        [rgba(value) for value in given]
        if given is not None and not isinstance(given, str)
        else rgba(given or PALETTE[index % len(PALETTE)])
    )
    options = {
        "color": colour,
        "label": trace.name if trace.showlegend is not False and trace.name else None,
        "alpha": trace.opacity,
        "edgecolor": rgba(trace.marker.line.color or "rgba(0,0,0,0)"),
        "linewidth": (trace.marker.line.width or 0) * POINTS_PER_PIXEL,
    }
    if horizontal:
        panel.axes.barh(centre, length, height=thickness, left=base, **options)
    else:
        panel.axes.bar(centre, length, width=thickness, bottom=base, **options)


def _colour_map(scale: Any) -> Any:
    colours = require("matplotlib.colors", "notebooks")
    return colours.LinearSegmentedColormap.from_list("scale", [(float(at), rgba(colour)) for at, colour in scale])


def _edges(centres: np.ndarray) -> np.ndarray:
    """Cell borders half-way between centres."""
    if len(centres) == 1:
        return np.asarray([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _heatmap(canvas: StaticFigure, panel: Panel, trace: Any) -> None:
    z = np.asarray([[np.nan if value is None else value for value in row] for row in trace.z], dtype=float)
    x, y = _values(panel, trace.x, "x", z.shape[1]), _values(panel, trace.y, "y", z.shape[0])
    colours = require("matplotlib.colors", "notebooks")
    low = np.nanmin(z) if trace.zmin is None else trace.zmin
    high = np.nanmax(z) if trace.zmax is None else trace.zmax
    mesh = panel.axes.pcolormesh(
        _edges(x),
        _edges(y),
        z,
        cmap=_colour_map(trace.colorscale),
        norm=colours.Normalize(low, high),
        edgecolors="white",
        linewidth=trace.xgap or 0,
    )
    if trace.texttemplate and trace.text is not None:
        for row, line in enumerate(trace.text):
            for column, text in enumerate(line):
                shade = np.dot(mesh.cmap(mesh.norm(z[row, column]))[:3], (0.299, 0.587, 0.114))
                panel.axes.text(
                    x[column],
                    y[row],
                    str(text),
                    ha="center",
                    va="center",
                    clip_on=True,
                    color="white" if shade < 0.55 else "black",
                    size=(trace.textfont.size or 11) * POINTS_PER_PIXEL,
                )
    if trace.showscale is not False:
        position = panel.axes.get_position()
        bar = canvas.colorbar(mesh, cax=canvas.add_axes((position.x1 + 0.015, position.y0, 0.016, position.height)))
        if trace.colorbar.tickformat:
            bar.ax.yaxis.set_major_formatter(number_format(trace.colorbar.tickformat))
        bar.ax.tick_params(labelsize=12 * POINTS_PER_PIXEL, colors="#333333")
        bar.outline.set_visible(False)
        title = trace.colorbar.title.text
        if title:
            bar.set_label(title.replace("<br>", " "), size=12 * POINTS_PER_PIXEL, color="#333333")
