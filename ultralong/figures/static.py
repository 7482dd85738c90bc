"""Draw a plotly figure with matplotlib: the still picture beside every interactive figure.

Plotly's own export starts a browser and takes seconds a figure. This reads the same traces and layout instead, so the
picture cannot disagree with the interactive figure. It knows what the project draws: scatter (lines, markers, text,
filled bands, error bars), bar and heatmap traces, subplots, log and category axes, shapes, annotations, legends.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ultralong.figures.marks import Panel, draw_trace, number_format, rgba
from ultralong.figures.panels import MOST_LEFT, make_room
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as StaticFigure
    from plotly.graph_objects import Figure

PIXELS_PER_INCH = 96
POINTS_PER_PIXEL = 72 / PIXELS_PER_INCH
DEFAULT_SIZE = (760, 380)
INK = "#333333"
COLOUR_BAR_PIXELS = 76
LEGEND_ROW_PIXELS = 24


def draw(figure: Figure, *, width: int | None = None, height: int | None = None) -> StaticFigure:
    """Draw `figure` on a matplotlib canvas of the same size and layout, black on white.

    Args:
        figure: The plotly figure; it is not changed.
        width: Pixels; None takes the figure's, or 760.
        height: Pixels; None takes the figure's, or 380.

    Returns:
        A matplotlib figure, ready for `savefig`.

    Raises:
        ValueError: A trace is of a type that is not known here.
    """
    unknown = sorted({trace.type for trace in figure.data} - {"scatter", "bar", "heatmap"})
    if unknown:
        raise ValueError(
            f"Cannot draw traces of type {', '.join(unknown)} as a still picture: use scatter, bar or heatmap."
        )
    backend = require("matplotlib.backends.backend_agg", extra="notebooks")
    layout = figure.layout
    size = (width or layout.width or DEFAULT_SIZE[0], height or layout.height or DEFAULT_SIZE[1])
    canvas = require("matplotlib.figure", extra="notebooks").Figure(
        figsize=(size[0] / PIXELS_PER_INCH, size[1] / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    backend.FigureCanvasAgg(canvas)
    box = _plot_box(figure, size)
    panels = _make_panels(canvas, figure, box)
    for index, trace in enumerate(figure.data):
        key = (trace.xaxis or "x", trace.yaxis or "y")
        draw_trace(canvas, panels[key], trace, index, figure)
    axes = {key: panel.axes for key, panel in panels.items()}
    for (x, y), panel in axes.items():
        _style_axis(panel, "x", layout[_long_name(x)])
        _style_axis(panel, "y", layout[_long_name(y)])
    box = make_room(canvas, list(axes.values()), box)
    for shape in layout.shapes:
        _draw_shape(axes, shape)
    for annotation in layout.annotations:
        _draw_annotation(canvas, axes, box, annotation)
    _draw_title_and_legend(canvas, figure, axes, size)
    return canvas


def _long_name(axis: str) -> str:
    """`x2` as the layout calls it: `xaxis2`."""
    return f"{axis[0]}axis{axis[1:]}"


def _named_in_legend(figure: Figure) -> list[Any]:
    return [
        trace
        for trace in figure.data
        if trace.name and trace.showlegend is not False and trace.type in ("scatter", "bar")
    ]


def legend_rows(figure: Figure, width: float) -> int:
    """Lines that the legend takes at a width in pixels; 0 where a figure has none."""
    named = _named_in_legend(figure)
    if figure.layout.showlegend is False or (len(named) < 2 and not figure.layout.showlegend):
        return 0
    # Names stand in columns as wide as the widest of them.
    columns = max(1, int(0.86 * width / (62 + 7 * max(len(trace.name) for trace in named))))
    return -(-len(named) // columns)


def _plot_box(figure: Figure, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """The area of plotly's "paper" in figure fractions: left, bottom, width, height."""
    margin, (width, height) = figure.layout.margin, size
    left = min(margin.l if margin.l is not None else 80, MOST_LEFT * width)
    right = margin.r if margin.r is not None else 40
    top, bottom = margin.t if margin.t is not None else 60, margin.b if margin.b is not None else 60
    if any(trace.type == "heatmap" and trace.showscale is not False for trace in figure.data):
        right += COLOUR_BAR_PIXELS
    bottom += LEGEND_ROW_PIXELS * legend_rows(figure, width)
    return left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height


def _make_panels(canvas: StaticFigure, figure: Figure, box: tuple[float, float, float, float]) -> dict:
    """One panel for each pair of plotly axes that a trace uses."""
    panels: dict[tuple[str, str], Panel] = {}
    for trace in figure.data:
        x, y = trace.xaxis or "x", trace.yaxis or "y"
        if (x, y) in panels:
            continue
        x_domain = figure.layout[_long_name(x)].domain or (0.0, 1.0)
        y_domain = figure.layout[_long_name(y)].domain or (0.0, 1.0)
        panels[x, y] = Panel(
            canvas.add_axes(
                (
                    box[0] + x_domain[0] * box[2],
                    box[1] + y_domain[0] * box[3],
                    (x_domain[1] - x_domain[0]) * box[2],
                    (y_domain[1] - y_domain[0]) * box[3],
                )
            )
        )
    return panels


def _style_axis(panel: Axes, direction: Literal["x", "y"], axis: Any) -> None:
    """Apply an axis' type, range, ticks, title and grid to a panel."""
    handle = panel.xaxis if direction == "x" else panel.yaxis
    set_limits = panel.set_xlim if direction == "x" else panel.set_ylim
    log = axis.type == "log"
    if log:
        (panel.set_xscale if direction == "x" else panel.set_yscale)("log")
    if axis.range is not None:
        set_limits(*(10.0 ** np.asarray(axis.range, float) if log else axis.range))
    elif axis.autorange == "reversed" and not handle.get_inverted():
        handle.set_inverted(True)
    if axis.tickvals is not None:
        names = None if axis.ticktext is None else [_plain(str(text)) for text in axis.ticktext]
        handle.set_ticks(list(axis.tickvals), names)
        handle.set_minor_locator(require("matplotlib.ticker", extra="notebooks").NullLocator())
    if axis.tickformat and axis.ticktext is None:
        handle.set_major_formatter(number_format(axis.tickformat))
    handle.label.set(text=_plain(axis.title.text), size=13 * POINTS_PER_PIXEL, color=INK)
    hidden = axis.visible is False
    handle.set_visible(not hidden)
    panel.tick_params(
        axis=direction,
        labelsize=12 * POINTS_PER_PIXEL,
        colors=INK,
        length=3,
        **{f"label{'bottom' if direction == 'x' else 'left'}": axis.showticklabels is not False},
    )
    if axis.showgrid is not False and not hidden:
        panel.grid(True, axis=direction, color="#d9d9d9", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right") + ((("bottom",) if direction == "x" else ("left",)) if hidden else ()):
        panel.spines[side].set_visible(False)


def _plain(text: str | None) -> str:
    """Plotly's inline tags as plain lines: a picture has no markup."""
    plain = (text or "").replace("<br>", "\n")
    for tag in ("<b>", "</b>", "<i>", "</i>", "<sub>", "</sub>", "<sup>", "</sup>"):
        plain = plain.replace(tag, "")
    # A dollar sign would begin a formula.
    return html.unescape(plain).replace("$", r"\$")


def _find_panel(panels: dict, x_reference: str | None, y_reference: str | None) -> Axes:
    """The panel that a shape or annotation refers to; one with no axis of its own goes to the first panel."""
    x, y = (
        reference.split()[0] if reference and reference != "paper" else None
        for reference in (x_reference or "x", y_reference or "y")
    )
    return next(
        (panel for (px, py), panel in panels.items() if x in (None, px) and y in (None, py)),
        next(iter(panels.values())),
    )


def _transform(panel: Axes, x_reference: str | None, y_reference: str | None) -> Any:
    """Coordinates of a shape: data on an axis, or the panel's fraction for `domain` and `paper`."""
    blended = require("matplotlib.transforms", extra="notebooks").blended_transform_factory
    x, y = (
        reference is not None and (reference == "paper" or reference.endswith("domain"))
        for reference in (x_reference, y_reference)
    )
    return blended(panel.transAxes if x else panel.transData, panel.transAxes if y else panel.transData)


def _draw_shape(panels: dict, shape: Any) -> None:
    panel = _find_panel(panels, shape.xref, shape.yref)
    transform = _transform(panel, shape.xref, shape.yref)
    colour, alpha = rgba(shape.line.color or INK), shape.opacity if shape.opacity is not None else 1.0
    line_width = (2 if shape.line.width is None else shape.line.width) * POINTS_PER_PIXEL
    if shape.type == "line":
        style = {"dash": "--", "dot": ":", "dashdot": "-.", "longdash": "--"}.get(shape.line.dash, "-")
        panel.plot(
            [shape.x0, shape.x1],
            [shape.y0, shape.y1],
            transform=transform,
            color=colour,
            alpha=alpha,
            linewidth=line_width,
            linestyle=style,
            scalex=False,
            scaley=False,
        )
    elif shape.type == "rect":
        rectangle = require("matplotlib.patches", extra="notebooks").Rectangle
        below = shape.layer in ("below", "between")
        panel.add_patch(
            rectangle(
                (shape.x0, shape.y0),
                shape.x1 - shape.x0,
                shape.y1 - shape.y0,
                transform=transform,
                facecolor=rgba(shape.fillcolor or "rgba(0,0,0,0)"),
                edgecolor=colour,
                alpha=alpha,
                linewidth=line_width,
                zorder=0.5 if below else 2,
            )
        )
    else:
        raise ValueError(f"Cannot draw a shape of type {shape.type!r}: use line or rect.")


def _draw_annotation(canvas: StaticFigure, panels: dict, box: tuple, annotation: Any) -> None:
    """Place text; on a log axis plotly gives an annotation's position as its logarithm."""
    horizontal = {"auto": "center", None: "center"}.get(annotation.xanchor, annotation.xanchor)
    vertical = {"auto": "center", None: "center", "middle": "center"}.get(annotation.yanchor, annotation.yanchor)
    size = (annotation.font.size or 13) * POINTS_PER_PIXEL
    style = {"ha": horizontal, "va": vertical, "color": INK, "size": size, "rotation": -(annotation.textangle or 0)}
    if annotation.xref == "paper" and annotation.yref == "paper":
        lift = (annotation.yshift or 0) / (canvas.get_figheight() * PIXELS_PER_INCH)
        canvas.text(
            box[0] + annotation.x * box[2], box[1] + annotation.y * box[3] + lift, _plain(annotation.text), **style
        )
        return
    panel = _find_panel(panels, annotation.xref, annotation.yref)
    x, y = annotation.x, annotation.y
    if panel.get_xscale() == "log" and (annotation.xref or "x") in ("x", *(k[0] for k in panels)):
        x = 10.0**x
    if panel.get_yscale() == "log" and (annotation.yref or "y") in ("y", *(k[1] for k in panels)):
        y = 10.0**y
    shift = (annotation.xshift or 0, annotation.yshift or 0)
    if annotation.showarrow is not False:
        shift = (-10 if annotation.ax is None else annotation.ax, 30 if annotation.ay is None else -annotation.ay)
    panel.annotate(
        _plain(annotation.text),
        (x, y),
        xycoords=_transform(panel, annotation.xref, annotation.yref),
        xytext=(shift[0] * POINTS_PER_PIXEL, shift[1] * POINTS_PER_PIXEL),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->", "color": INK} if annotation.showarrow is not False else None,
        **style,
    )


def _draw_title_and_legend(canvas: StaticFigure, figure: Figure, panels: dict, size: tuple[float, float]) -> None:
    title = figure.layout.title.text
    if title:
        left = min(panel.get_position().x0 for panel in panels.values()) if panels else 0.02
        canvas.text(left, 1 - 10 / size[1], _plain(title), ha="left", va="top", size=16 * POINTS_PER_PIXEL, color=INK)
    rows = legend_rows(figure, size[0])
    if rows:
        handles = {
            label: handle
            for panel in panels.values()
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        canvas.legend(
            list(handles.values()),
            [_plain(label) for label in handles],
            loc="lower left",
            bbox_to_anchor=(min(panel.get_position().x0 for panel in panels.values()), 0.0),
            ncols=int(np.ceil(len(handles) / rows)),
            frameon=False,
            fontsize=12 * POINTS_PER_PIXEL,
            borderaxespad=0.2,
            handlelength=2.4,
        )
