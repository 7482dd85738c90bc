"""Panels: figures that each have one pair of axes next to each other in one, and room for the names at their left.

Plotly makes that room by itself (`automargin`), for a still picture it is made here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultralong.figures.theme import shortened, style
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as StaticFigure
    from plotly.graph_objects import Figure

EDGE = 4  # pixels left free beside the longest name
MOST_LEFT = 0.5  # of the width: names that need more are shortened, as the panels would have no room
TRIES = 5  # the letters that are left out may be narrower than the others
Box = tuple[float, float, float, float]

AXIS_SETTINGS = (
    "type",
    "range",
    "autorange",
    "tickvals",
    "ticktext",
    "tickmode",
    "showgrid",
    "visible",
    "showticklabels",
    "tickformat",
)


def side_by_side(
    figures: Sequence[Figure],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    title: str = "",
    height: int | None = None,
) -> Figure:
    """Panels in a row (or in rows of `columns`), with the titles above each and one shared legend.

    Args:
        figures: Each with a single pair of axes; they are not changed.
        titles: One for each.
        columns: Panels in a row; None puts all in one row up to four, then two rows.
        title: Title of the whole.
        height: Pixels; None takes the tallest panel for each row.

    Raises:
        ValueError: No figures, or another number of titles.
    """
    if not figures or len(figures) != len(titles):
        raise ValueError(
            f"side_by_side() needs one title for each figure, got {len(figures)} figures and {len(titles)} titles."
        )
    if columns is None:
        columns = len(figures) if len(figures) <= 4 else -(-len(figures) // 2)
    rows = -(-len(figures) // columns)
    joined = require("plotly.subplots", extra="notebooks").make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(titles),
        horizontal_spacing=0.24 / max(columns, 2),
        vertical_spacing=0.34 / max(rows, 2),
    )
    tallest = max(figure.layout.height or 380 for figure in figures)
    style(joined, title=title, height=height or tallest * rows)
    joined.update_layout(margin={"t": 84 if title else 48}, barmode=figures[0].layout.barmode)
    # Room at the right for what stands beside the last panel, such as the name of a limit.
    joined.update_layout(margin={"r": max(figure.layout.margin.r or 0 for figure in [*figures, joined])})
    # A note at the top edge of a panel (a marked window) needs the line that a panel's title would take.
    if any(figure.layout.annotations for figure in figures):
        joined.update_annotations(yshift=16)
    seen: set[str] = set()
    for index, figure in enumerate(figures):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        _copy_panel(joined, figure, place, index, seen, last=index == len(figures) - 1)
        if place["col"] > 1:
            joined.update_yaxes(title_text="", **place)
    return joined


def _copy_panel(
    joined: Figure, figure: Figure, place: dict[str, int], index: int, seen: set[str], *, last: bool
) -> None:
    """Copy traces, axis settings, shapes and notes of one figure into one panel."""
    for trace in figure.data:
        # A trace belongs to one figure only.
        trace = copy.deepcopy(trace)
        if trace.type == "heatmap":
            trace.showscale = last and trace.showscale is not False
        elif trace.name in seen:
            trace.showlegend = False
        elif trace.name:
            seen.add(trace.name)
        joined.add_trace(trace, **place)
    number = "" if index == 0 else str(index + 1)
    for letter in "xy":
        source, target = figure.layout[f"{letter}axis"], joined.layout[f"{letter}axis{number}"]
        target.title.text = source.title.text
        for name in AXIS_SETTINGS:
            if source[name] is not None:
                target[name] = source[name]
    for shape in figure.layout.shapes:
        joined.add_shape(_moved(shape, number))
    for annotation in figure.layout.annotations:
        # What stands beside a panel, such as the name of a limit, has room beside the last one only.
        if last or not (annotation.xref == "x domain" and annotation.xanchor == "left" and annotation.x >= 1):
            joined.add_annotation(_moved(annotation, number))


def _moved(item: Any, number: str) -> Any:
    """A shape or note with its references pointed at another panel; `paper` means that panel's own area."""
    moved = copy.deepcopy(item)
    for letter in "xy":
        reference = moved[f"{letter}ref"] or letter
        moved[f"{letter}ref"] = f"{letter}{number}" if reference == letter else f"{letter}{number} domain"
    return moved


def make_room(canvas: StaticFigure, panels: Sequence[Axes], box: Box) -> Box:
    """Move the panels to the right until the longest name at the left is whole, or shortened to what there may be.

    Args:
        canvas: The picture; its panels have their axes, and nothing yet that stands beside them at the left.
        panels: The panels.
        box: The area of plotly's "paper" in figure fractions: left, bottom, width, height.

    Returns:
        The area that is left.
    """
    missing = _missing(canvas, panels)
    move = min(missing, max(0.0, MOST_LEFT - box[0]) * canvas.bbox.width) / canvas.bbox.width
    if move > 0:
        right, scale = box[0] + box[2], 1 - move / box[2]
        for panel in panels:
            x0, y0, width, height = panel.get_position().bounds
            panel.set_position((right - (right - x0) * scale, y0, width * scale, height))
        box = box[0] + move, box[1], box[2] * scale, box[3]
    for panel in panels:
        for _ in range(TRIES):
            if (cut := _missing(canvas, [panel])) > 1:  # one pixel is what measuring may be off by
                _shorten(canvas, panel, cut)
    return box


def _missing(canvas: StaticFigure, panels: Sequence[Axes]) -> float:
    """Pixels that the longest name lacks at the left; negative where there is more room."""
    renderer = canvas.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg's canvas has one
    found = [panel.yaxis.get_tightbbox(renderer) for panel in panels]
    return EDGE - min((box.x0 for box in found if box is not None), default=float(EDGE))


def _shorten(canvas: StaticFigure, panel: Axes, cut: float) -> None:
    """Take so many pixels off the longest names of a panel that begins at the left edge; numbers stay."""
    if not isinstance(panel.yaxis.get_major_locator(), require("matplotlib.ticker", extra="notebooks").FixedLocator):
        return
    renderer = canvas.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = panel.get_yticklabels()
    widths = [label.get_window_extent(renderer).width for label in labels]
    room = max(widths, default=0.0) - cut
    names = [
        shortened(label.get_text(), int(len(label.get_text()) * room / width)) if width > room else label.get_text()
        for label, width in zip(labels, widths, strict=True)
    ]
    panel.set_yticks(panel.get_yticks(), names)
