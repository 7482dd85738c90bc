"""Figures of documents and packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ultralong.figures.theme import PALETTE, graph_objects, new_figure, translucent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def packed_row(rows: Sequence[Sequence[int]], title: str = "", *,
               names: Sequence[Sequence[str]] | None = None) -> Figure:
    """Packed rows as bars: each block is one document, or the part of it that fell into this row.

    Args:
        rows: For each row its document boundaries, cumulative token counts from 0 to the row's length.
        title: Title of the figure.
        names: For each row the name of each block, shown on hover; None numbers them.

    Raises:
        ValueError: Boundaries that do not start at 0 or that fall.
    """
    figure = new_figure(title, "position in the row (tokens)", "", height=110 + 44 * len(rows))
    bar = graph_objects().Bar
    for index, boundaries in enumerate(rows):
        cuts = [int(cut) for cut in boundaries]
        if not cuts or cuts[0] != 0 or cuts != sorted(cuts):
            raise ValueError(f"Row {index}: boundaries must rise from 0, got {cuts[:8]}.")
        lengths = [end - start for start, end in pairwise(cuts)]
        labels = list(names[index]) if names is not None else [f"document {block + 1}" for block in range(len(lengths))]
        figure.add_trace(bar(
            orientation="h", y=[f"row {index + 1}"] * len(lengths), x=lengths, base=cuts[:-1], width=0.7,
            showlegend=False,
            # Two hues by turns, each light and full: neighbours always differ, however many documents there are.
            marker={"color": [translucent(PALETTE[block % 2], (0.9, 0.9, 0.45, 0.45)[block % 4])
                              for block in range(len(lengths))], "line": {"color": "#ffffff", "width": 1}},
            customdata=labels, hovertemplate="%{customdata}: %{x:,} tokens from %{base:,}<extra></extra>"))
    figure.update_layout(barmode="overlay", bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
