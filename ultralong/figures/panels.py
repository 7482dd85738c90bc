"""Put figures that each have one pair of axes next to each other in one figure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultralong.figures.theme import style
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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
