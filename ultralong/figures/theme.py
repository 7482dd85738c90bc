"""The style of every figure: colours that colour-blind readers can distinguish, and plain axes.

Plotly figures are transparent with mid-grey text and grid, so that they read on light and dark pages alike. Colour is
never the only sign: lines also differ in dash or marker, heatmap cells carry their count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ultralong.utils.extras import require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's palette (2008), ordered so that neighbours differ in lightness as well as in hue.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "solid", "dash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "circle-open")

GREY = "#7f7f7f"
GRID = "rgba(127,127,127,0.25)"
CLEAR = "rgba(0,0,0,0)"

# 0 is orange, 1 is blue, the middle is pale: the two ends stay apart in every common kind of colour blindness.
SCORE_SCALE = ((0.0, "#D55E00"), (0.5, "#F3E9DC"), (1.0, "#0072B2"))


def graph_objects() -> Any:
    """`plotly.graph_objects`, imported when the first figure is drawn."""
    return require("plotly.graph_objects", extra="notebooks")


def new_figure(title: str = "", x: str = "", y: str = "", *, height: int = 380, width: int | None = None) -> Figure:
    """An empty figure in the project's style.

    Args:
        title: Title above the plot.
        x: Title of the horizontal axis, with its unit.
        y: Title of the vertical axis, with its unit.
        height: Height in pixels.
        width: Width in pixels; None follows the page.
    """
    # Made with all its settings at once: plotly takes ten times longer to change the same ones of a figure.
    axes = {"xaxis": _axis() | {"title": {"text": x, "font": {"size": 13}}}}
    # The left margin grows with long tick labels, so that they do not run into the title.
    axes["yaxis"] = _axis() | {"automargin": True, "title": {"text": y, "font": {"size": 13}}}
    return graph_objects().Figure(layout=_layout(title, height, width) | axes)


def style(figure: Figure, *, title: str = "", height: int = 380, width: int | None = None) -> Figure:
    """Give an existing figure (such as one from `make_subplots`) the project's style, in place.

    Returns:
        The same figure.
    """
    figure.update_layout(**_layout(title, height, width))
    figure.update_xaxes(**_axis(), title_font_size=13)
    figure.update_yaxes(**_axis(), automargin=True, title_font_size=13)
    return figure


def _layout(title: str, height: int, width: int | None) -> dict[str, Any]:
    return {
        "title": {"text": title, "x": 0.0, "xref": "paper", "font": {"size": 16}},
        "height": height,
        "width": width,
        # Plotly's default template adds kilobytes to every saved figure, and all it sets is set here.
        "template": graph_objects().layout.Template(),
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"color": GREY, "size": 13},
        "colorway": list(PALETTE),
        "margin": {"l": 64, "r": 24, "t": 56 if title else 32, "b": 56},
        "hovermode": "closest",
        # At the lower edge of the figure, whatever its height; `show.plotly_json` makes room for it.
        "legend": {"bgcolor": CLEAR, "orientation": "h", "xanchor": "left", "x": 0.0}
        | {"yref": "container", "yanchor": "bottom", "y": 0.0},
    }


def _axis() -> dict[str, Any]:
    return {"gridcolor": GRID, "linecolor": GREY, "zeroline": False, "ticks": "outside", "tickcolor": GREY}


def level_line(value: float, *, width: float = 1.5, dash: str = "dash") -> dict[str, Any]:
    """A horizontal line over the whole width of a figure, as a shape of plotly.

    Args:
        value: Where, in the units of the vertical axis.
        width: Pixels.
        dash: Plotly's name of the line style.
    """
    across = {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "yref": "y", "y0": value, "y1": value}
    return across | {"line": {"color": GREY, "width": width, "dash": dash}}


def plain_text(text: str) -> str:
    """A text that plotly shows as it is: its labels read `<b>` and the like as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shortened(text: str, most: int) -> str:
    """A name of at most so many characters, without its middle: names often end in what tells them apart."""
    if len(text) <= most:
        return text
    end = max(0, most - 1) // 3
    return f"{text[: max(0, most - 1 - end)]}\u2026{text[len(text) - end :]}"


def tokens_label(tokens: float) -> str:
    """A short name for a number of tokens, in binary thousands as lengths are given: 512, 8K, 1.5K, 1M.

    Powers of two up to 4M read exactly; other numbers are rounded to three digits.
    """
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}" if tokens < 1000 * unit else f"{tokens / unit:.0f}{name}"
    return f"{tokens:.0f}"


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Settings of a logarithmic axis whose labels a reader can tell apart, for values that it shows.

    Less than a decade and a half gets ticks at 1, 2 and 5 times powers of ten, many decades one tick for several.
    Plotly's own labels say micro and femto for small numbers; here they are powers of ten.
    """
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    decades = math.log10(high / low)
    axis: dict[str, Any] = {"type": "log", "dtick": max(1, math.ceil(decades / 7))}
    if decades < 1.5:
        steps = [digit * 10.0**power for power in range(-12, 13) for digit in (1, 2, 5)]
        near = [step for step in steps if 0.8 * low <= step <= 1.25 * high]
        if len(near) > 1:
            axis = {"type": "log", "tickvals": near, "ticktext": [_short(step) for step in near]}
    if low < 1e-3:
        axis["exponentformat"] = "power"
    return axis


def _short(value: float) -> str:
    """A tick's label: 0.05, 2, 500, 20k, 1M."""
    for size, name in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if name == 'k' else size):g}{name}"
    return f"{value:g}"


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` as `rgba(...)` with the given opacity, for bands under a line."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"
