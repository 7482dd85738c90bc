"""Figures of memory: bytes stacked by what takes them, beside what a GPU has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ultralong.figures.theme import GREY, PALETTE, graph_objects, level_line, new_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_NAMED = 6  # bars that have their name below them; of more, some have


def stacked_bytes(
    bars: Mapping[str, Mapping[str, float]],
    title: str = "",
    *,
    x: str = "",
    unit: str = "GiB",
    limit: float | None = None,
    limit_name: str = "",
    most: float | None = None,
    height: int = 360,
) -> Figure:
    """One stacked bar for each configuration or moment; its parts are what takes the memory.

    Args:
        bars: Name of the bar to the size of each of its parts. A part that a bar lacks is 0.
        title: Title of the figure.
        x: Title of the horizontal axis.
        unit: Unit of the sizes.
        limit: What there is, drawn as a line across the bars.
        limit_name: What the line is called.
        most: Top of the axis, the same for several figures; None fits the bars.
        height: Height in pixels.
    """
    figure = new_figure(title, x, unit, height=height)
    names = list(bars)
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    for index, part in enumerate(parts):
        figure.add_trace(
            graph_objects().Bar(
                name=part,
                x=list(range(len(names))),
                y=[round(bar.get(part, 0.0), 4) for bar in bars.values()],
                customdata=names,
                marker={"color": PALETTE[index % len(PALETTE)]},
                hovertemplate="%{customdata}: %{y:,.4g} " + unit + "<extra>" + part + "</extra>",
            )
        )
    top = most or 1.08 * max(sum(bar.values()) for bar in bars.values())
    figure.update_layout(barmode="stack", showlegend=len(parts) > 1)
    # Places with names, not an axis of categories: there plotly takes the place 6 for the bar whose name is "6".
    step = -(-len(names) // MOST_NAMED) if len(names) > MOST_NAMED else 1
    figure.update_xaxes(
        range=[-0.5, len(names) - 0.5],
        tickvals=list(range(0, len(names), step)),
        ticktext=names[::step],
        showgrid=False,
    )
    figure.update_yaxes(range=[0, max(top, 1.15 * (limit or 0.0))])
    if limit is not None:
        _mark_limit(figure, limit, limit_name)
    return figure


def _mark_limit(figure: Figure, limit: float, name: str) -> None:
    """A line across the bars at what there is, and its name."""
    figure.add_shape(level_line(limit, width=2))
    # Beside the bars: above the line the last bar may hide it.
    figure.update_layout(margin={"r": 24 + 7 * len(name)})
    figure.add_annotation(
        x=1.0,
        y=limit,
        xref="x domain",
        yref="y",
        text=name,
        showarrow=False,
        xanchor="left",
        yanchor="middle",
        font={"size": 11, "color": GREY},
    )
