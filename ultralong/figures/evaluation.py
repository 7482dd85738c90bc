"""Figures of what a model does with its window: needle maps and perplexity by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.figures.panels import side_by_side
from ultralong.figures.theme import (
    DASHES,
    GREY,
    MARKERS,
    PALETTE,
    SCORE_SCALE,
    graph_objects,
    new_figure,
    plain_text,
    tokens_label,
    translucent,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_LABELLED = 12
WIDE_RANGE = 20  # beyond this ratio a linear axis flattens the lower curve


def needle_heatmap(
    cells: Sequence[Mapping[str, Any]],
    title: str = "",
    *,
    base_window: int | None = None,
    window_name: str = "old window",
) -> Figure:
    """Retrieval by prompt length and needle depth: blue is found, orange is missed.

    Small grids carry the counts in their cells, so that colour is not the only sign. A grey line marks the window the
    model had before it was extended.

    Args:
        cells: One mapping a cell with `length` (tokens), `depth` (0 first, 1 last), `n` and `correct` (a sum of scores
            where answers can be right in part).
        title: Title of the figure.
        base_window: The old window in tokens; lengths beyond it lie right of the line.
        window_name: What the line is called.

    Raises:
        ValueError: No cells, or two for the same length and depth.
    """
    if not cells:
        raise ValueError("needle_heatmap() got no cells: run the needle grid first.")
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    if len({(cell["length"], cell["depth"]) for cell in cells}) != len(cells):
        raise ValueError("needle_heatmap() got two cells of the same length and depth: join their counts first.")
    score = np.full((len(depths), len(lengths)), np.nan)
    text = np.full(score.shape, "", dtype=object)
    for cell in cells:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        score[row, column] = cell["correct"] / cell["n"] if cell["n"] else np.nan
        text[row, column] = f"{cell['correct']:g}/{cell['n']}"
    figure = new_figure(title, "prompt and answer (tokens)", "needle depth", height=340)
    figure.add_trace(_cells(score, text, lengths, depths))
    _tick(figure.update_xaxes, [tokens_label(length) for length in lengths])
    _tick(figure.update_yaxes, [f"{depth:.0%}" for depth in depths])
    # Pinned ranges keep the half cells at the borders, and put the shallowest needle on top as a page is read.
    figure.update_xaxes(range=[-0.5, len(lengths) - 0.5], showgrid=False)
    figure.update_yaxes(range=[len(depths) - 0.5, -0.5], showgrid=False)
    if base_window is not None:
        inside = sum(length <= base_window for length in lengths)
        _mark_window(figure, inside - 0.5, f"{window_name} {tokens_label(base_window)}")
    return figure


def _cells(score: np.ndarray, text: np.ndarray, lengths: Sequence[int], depths: Sequence[float]) -> Any:
    """The coloured cells of scores (depths, lengths), a small grid with its counts as text."""
    labelled = len(lengths) <= MOST_LABELLED and len(depths) <= MOST_LABELLED
    return graph_objects().Heatmap(
        z=score,
        x=list(range(len(lengths))),
        y=list(range(len(depths))),
        zmin=0.0,
        zmax=1.0,
        xgap=1,
        ygap=1,
        colorscale=[list(stop) for stop in SCORE_SCALE],
        text=text,
        texttemplate="%{text}" if labelled else None,
        textfont={"size": 11},
        customdata=[[f"{tokens_label(length)} tokens, depth {depth:.0%}" for length in lengths] for depth in depths],
        hovertemplate="%{customdata}: %{text} found<extra></extra>",
        colorbar={
            "title": {"text": "found", "side": "right", "font": {"size": 13}},
            "tickformat": ".0%",
            "thickness": 12,
        },
    )


def _tick(update: Any, labels: list[str]) -> None:
    """Label each cell of a small grid and about twelve of a large one."""
    step = -(-len(labels) // MOST_LABELLED)
    update(tickvals=list(range(0, len(labels), step)), ticktext=labels[::step])


def _mark_window(figure: Figure, at: float, name: str) -> None:
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, xref="x", yref="y domain", line={"color": GREY, "width": 4})
    figure.add_annotation(
        x=at,
        y=1,
        xref="x",
        yref="y domain",
        text=name,
        showarrow=False,
        xanchor="left" if at <= 0.5 else "center",
        yanchor="bottom",
        font={"size": 11, "color": GREY},
    )


def needle_before_after(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, base_window: int, title: str = ""
) -> Figure:
    """Two needle maps side by side: the model before and after its window was extended.

    Args:
        before: Cells of the model before, as `needle_heatmap` takes them.
        after: Cells of the model after.
        base_window: The old window in tokens.
        title: Title of the whole.
    """
    return side_by_side(
        [needle_heatmap(cells, base_window=base_window) for cells in (before, after)],
        ["before", "after"],
        title=title,
        height=380,
    )


def perplexity_curve(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str = "",
    *,
    base_window: int | None = None,
    window_name: str = "old window",
    by: str = "row",
) -> Figure:
    """Perplexity by position, one line a model, with its interval as a band.

    Args:
        curves: Name of the model to its bins, as `perplexity_by_position` returns them: `start`, `end` (tokens),
            `perplexity`, `low`, `high` (None where there is no interval).
        title: Title of the figure.
        base_window: The old window in tokens, drawn as a vertical line.
        window_name: What the line is called.
        by: What positions are counted from, as `perplexity_by_position` was told: `row` or `document`.
    """
    figure = new_figure(title, f"position in the {by} (tokens)", "perplexity", height=360)
    for index, (name, bins) in enumerate(curves.items()):
        _add_perplexities(figure, index, name, bins)
    figure.update_layout(showlegend=True)
    values = [item["perplexity"] for bins in curves.values() for item in bins]
    if max(values) > WIDE_RANGE * min(values):
        figure.update_yaxes(type="log", dtick=1)
    if base_window is not None:
        _mark_tokens(figure, base_window, window_name)
    return figure


def _add_perplexities(figure: Figure, index: int, name: str, bins: Sequence[Mapping[str, Any]]) -> None:
    """A model's line, the `index`-th of a figure, over the band of its interval."""
    colour, scatter = PALETTE[index % len(PALETTE)], graph_objects().Scatter
    x = [(item["start"] + item["end"]) / 2 for item in bins]
    known = [(place, item) for place, item in zip(x, bins, strict=True) if item["low"] is not None]
    figure.add_trace(
        scatter(
            x=[place for place, _ in known] + [place for place, _ in reversed(known)],
            y=[item["high"] for _, item in known] + [item["low"] for _, item in reversed(known)],
            fill="toself",
            fillcolor=translucent(colour, 0.2),
            line={"width": 0, "color": colour},
            mode="lines",
            showlegend=False,
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        scatter(
            x=x,
            y=[item["perplexity"] for item in bins],
            name=plain_text(name),
            mode="lines+markers",
            line={"color": colour, "dash": DASHES[index % len(DASHES)]},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            customdata=[f"{item['start']:,} to {item['end']:,}" for item in bins],
            hovertemplate="%{customdata}: %{y:.2f}<extra>%{fullData.name}</extra>",
        )
    )


def _mark_tokens(figure: Figure, tokens: int, name: str, *, logarithmic: bool = False) -> None:
    """A vertical line at a number of tokens, with what it is called above it."""
    figure.add_shape(
        type="line",
        x0=tokens,
        x1=tokens,
        y0=0,
        y1=1,
        xref="x",
        yref="y domain",
        line={"color": GREY, "width": 2, "dash": "dash"},
    )
    figure.add_annotation(
        # On a logarithmic axis plotly places notes, though not lines, by the logarithm.
        x=float(np.log10(tokens)) if logarithmic else tokens,
        y=1,
        xref="x",
        yref="y domain",
        showarrow=False,
        yanchor="bottom",
        text=f"{name} {tokens_label(tokens)}",
        font={"size": 11, "color": GREY},
    )


def score_curves(
    scores: Sequence[Mapping[str, Any]],
    title: str = "",
    *,
    base_window: int | None = None,
    window_name: str = "old window",
) -> Figure:
    """Score by length, one line a test, with its interval.

    Args:
        scores: One mapping a test and length: `task`, `length` (tokens), `score`, `low`, `high` (per cent; the ends may
            be None).
        title: Title of the figure.
        base_window: A window in tokens, drawn as a vertical line.
        window_name: What the line is called.

    Raises:
        ValueError: No scores.
    """
    if not scores:
        raise ValueError("score_curves() got no scores: answer some tests first.")
    figure = new_figure(title, "prompt and answer (tokens)", "score (per cent)", height=480)
    lengths = sorted({item["length"] for item in scores})
    for index, task in enumerate(dict.fromkeys(item["task"] for item in scores)):
        _add_scores(figure, index, task, [item for item in scores if item["task"] == task])
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[tokens_label(length) for length in lengths])
    figure.update_yaxes(range=[-3, 103])
    figure.update_layout(showlegend=True)
    if base_window is not None:
        _mark_tokens(figure, base_window, window_name, logarithmic=True)
    return figure


def _add_scores(figure: Figure, index: int, task: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """A test's line, the `index`-th of a figure, with its intervals as bars."""
    items = sorted(scores, key=lambda item: item["length"])
    reach = [
        (0.0, 0.0) if item["low"] is None else (item["high"] - item["score"], item["score"] - item["low"])
        for item in items
    ]
    colour = PALETTE[index % len(PALETTE)]
    figure.add_trace(
        graph_objects().Scatter(
            x=[item["length"] for item in items],
            y=[item["score"] for item in items],
            name=plain_text(task),
            mode="lines+markers",
            line={"color": colour, "dash": DASHES[index // len(PALETTE) % len(DASHES)], "width": 2},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            error_y={
                "type": "data",
                "array": [up for up, _ in reach],
                "arrayminus": [down for _, down in reach],
                "thickness": 1,
                "width": 3,
            },
        )
    )
