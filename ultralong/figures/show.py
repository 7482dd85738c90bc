"""Show a figure everywhere: interactive in Jupyter, as a picture on GitHub, as a sentence in a terminal.

A plotly figure alone vanishes on GitHub, which strips scripts; a picture alone cannot be explored. `show` sends both
and a sentence as one display bundle, and each reader picks what it can draw. Where a notebook runs for a live reader
(`INTERACTIVE = True`) the picture is left out: JupyterLab would show it until the pointer is over it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ultralong.figures.panels import side_by_side
from ultralong.figures.static import draw, legend_rows
from ultralong.figures.typed_arrays import compact
from ultralong.utils.extras import require
from ultralong.utils.files import atomic_path

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DOTS_PER_INCH = 96
MOST_STILLS = 4
COLOURS = 64
WIDTH = 760  # pixels of a figure without a width of its own
LEGEND_ROW = 24  # pixels


def png_bytes(figure: Figure, *, width: int | None = None, height: int | None = None, scale: float = 1.0) -> bytes:
    """Draw a plotly figure with matplotlib, on opaque white.

    Args:
        figure: Scatter, line, bar and heatmap traces, subplots included.
        width: Pixels; None takes the figure's, or 760.
        height: Pixels; None takes the figure's, or 380.
        scale: 2 doubles the pixels on each side for print.

    Returns:
        The PNG file's bytes. The same figure gives the same bytes.

    Raises:
        ValueError: The figure holds a trace type that `draw` does not know.
    """
    canvas = draw(figure, width=width, height=height)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DOTS_PER_INCH * scale, facecolor="white", metadata={"Software": None})
    # A palette makes the file four times smaller; a notebook holds many pictures. It is chosen to cover every colour
    # that is there, thin lines' too, and then moved to their means, so that none is off by more than a shade.
    image = require("PIL.Image", extra="notebooks")
    covering = {"method": image.Quantize.MAXCOVERAGE, "kmeans": 3, "dither": image.Dither.NONE}
    picture = image.open(buffer).convert("RGB").quantize(COLOURS, **covering)
    small = io.BytesIO()
    picture.save(small, format="PNG", optimize=True, dpi=(DOTS_PER_INCH * scale, DOTS_PER_INCH * scale))
    return small.getvalue()


def save_png(
    figure: Figure,
    path: str | os.PathLike[str],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float = 2.0,
) -> None:
    """Write the picture of a figure to `path`, atomically. See `png_bytes` for the arguments."""
    data = png_bytes(figure, width=width, height=height, scale=scale)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def plotly_json(figure: Figure) -> dict[str, Any]:
    """A figure as plotly's JSON, with room for its legend between the axis title and the lower edge.

    The legend stands at the lower edge (`theme.style`) and plotly keeps no place for it. Animations have theirs.
    """
    content = compact(json.loads(figure.to_json()))
    layout = content["layout"]
    if not layout.get("sliders") and figure.layout.legend.yref == "container":
        room = LEGEND_ROW * legend_rows(figure, figure.layout.width or WIDTH)
        layout["height"] = (figure.layout.height or 380) + room
        layout["margin"]["b"] = figure.layout.margin.b + room
    return content


def bundle(figure: Figure, alt: str) -> dict[str, Any]:
    """The display bundle of a figure: plotly JSON, PNG bytes, and the sentence.

    Args:
        figure: The figure.
        alt: What the figure shows, in a sentence, for readers who cannot see it.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("show() needs `alt`: one sentence that says what the figure shows.")
    return {
        "application/vnd.plotly.v1+json": plotly_json(figure),
        "image/png": png_bytes(figure),
        "text/plain": alt,
    }


def show(figure: Figure, alt: str) -> None:
    """Display a figure as one bundle: interactive, still picture and sentence together.

    Outside of IPython there is nothing to draw on, so the sentence is printed.

    Args:
        figure: The figure.
        alt: What the figure shows, in a sentence.
    """
    send(bundle(figure, alt))


def send(content: dict[str, Any]) -> None:
    """Display a bundle of `bundle` in a notebook; outside of IPython print its sentence."""
    ipython = require("IPython", extra="notebooks")
    kernel = ipython.get_ipython()
    alt = content["text/plain"]
    if kernel is None:
        print(alt)
        return
    # Colab draws pictures for certain, so they stay there.
    if kernel.user_ns.get("INTERACTIVE") is True and "google.colab" not in sys.modules:
        content = {kind: part for kind, part in content.items() if kind != "image/png"}
    # Where a page is made of a notebook, the picture's alternative text is read from the metadata.
    ipython.display.display(content, metadata={"image/png": {"alt": alt}}, raw=True)


def explore(
    function: Callable[[Any], Figure],
    name: str,
    values: Sequence[Any],
    *,
    stills: Sequence[Any] | None = None,
    interactive: bool = False,
    alt: str = "",
) -> None:
    """Show a figure at a few fixed values side by side, then, for a live reader, with a slider.

    The saved notebook keeps the panels: a slider's output lives only as long as its kernel.

    Args:
        function: From one value to a figure with one pair of axes.
        name: What the value is, shown on the slider and above each panel.
        values: What the slider offers, in order.
        stills: Values of the fixed panels; None takes up to four, spread over `values`.
        interactive: True adds the slider (needs ipywidgets and a running kernel).
        alt: A sentence for the panels; None makes one from `name`.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError(f"explore() got no values for {name!r}: give it at least one.")
    if stills is None:
        count = min(MOST_STILLS, len(values))
        stills = [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]
    titles = [f"{name} = {value}" for value in stills]
    show(
        side_by_side([function(value) for value in stills], titles),
        alt or f"Panels at {', '.join(titles)}, from left to right.",
    )
    if not interactive:
        return
    widgets = require("ipywidgets", extra="notebooks")
    slider = widgets.SelectionSlider(
        options=[(str(value), value) for value in values], value=stills[0], description=name, continuous_update=False
    )
    widgets.interact(lambda value: show(function(value), f"{name} = {value}"), value=slider)
