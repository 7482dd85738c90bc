"""Figures of documents and packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ultralong.figures.theme import PALETTE, graph_objects, new_figure, tokens_label, translucent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def packed_row(
    rows: Sequence[Sequence[int]], title: str = "", *, names: Sequence[Sequence[str]] | None = None, first: int = 1
) -> Figure:
    """Packed rows as bars: each block is one document, or the part of it that fell into this row.

    Args:
        rows: For each row its document boundaries, cumulative token counts from 0 to the row's length.
        title: Title of the figure.
        names: For each row the name of each block, shown on hover; None numbers them.
        first: Number of the first row.

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
        figure.add_trace(
            bar(
                orientation="h",
                y=[f"row {first + index}"] * len(lengths),
                x=lengths,
                base=cuts[:-1],
                width=0.7,
                showlegend=False,
                # Two hues alternate, each light and full: neighbours always differ, however many documents there are.
                marker={
                    "color": [
                        translucent(PALETTE[block % 2], (0.9, 0.9, 0.45, 0.45)[block % 4])
                        for block in range(len(lengths))
                    ],
                    "line": {"color": "#ffffff", "width": 1},
                },
                customdata=labels,
                hovertemplate="%{customdata}: %{x:,} tokens from %{base:,}<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def token_table(lines: Mapping[str, Sequence[str]], owners: Mapping[str, Sequence[int]], title: str = "") -> Figure:
    """Lines of tokens, aligned, each token in a cell coloured by its document.

    Args:
        lines: Name of each line (such as "input", "label") to its tokens as text; all lines of one length.
        owners: The same names to the document of each token; -1 is drawn grey (padding, no label).
        title: Title of the figure.

    Raises:
        ValueError: Lines of different lengths, or owners that do not match.
    """
    sizes = {len(tokens) for tokens in lines.values()} | {len(owner) for owner in owners.values()}
    if len(sizes) != 1 or list(lines) != list(owners):
        raise ValueError(f"token_table() needs lines and owners of one length and names, found {sorted(sizes)}.")
    kinds = [owner for line in owners.values() for owner in line if owner >= 0]
    order = {document: number for number, document in enumerate(dict.fromkeys(kinds))}
    shade = [[0.5 if owner < 0 else order[owner] % 2 for owner in owners[name]] for name in lines]
    figure = new_figure(title, "token", "", height=96 + 44 * len(lines))
    figure.add_trace(
        graph_objects().Heatmap(
            z=shade,
            y=list(lines),
            text=[list(tokens) for tokens in lines.values()],
            texttemplate="%{text}",
            textfont={"size": 11},
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=1,
            ygap=1,
            colorscale=[[0.0, "#9CC7E3"], [0.5, "#E3E3E3"], [1.0, "#F2C29B"]],
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, tickvals=list(range(0, len(shade[0]), 5)))
    return figure


def attention_mask(boundaries: Sequence[int], masked: bool, title: str = "") -> Figure:
    """Attention mask of one row as a square: query down, key across.

    Args:
        boundaries: Cumulative document lengths from 0 to the row's length; a short row, for every cell is drawn.
        masked: True shows attention that stays inside each document, False plain causal attention.
        title: Title of the figure.

    Raises:
        ValueError: Boundaries that do not start at 0 or that fall.
    """
    cuts = [int(cut) for cut in boundaries]
    if len(cuts) < 2 or cuts[0] != 0 or cuts != sorted(cuts):
        raise ValueError(f"boundaries must rise from 0, got {cuts[:8]}.")
    owner = [document for document, (start, end) in enumerate(pairwise(cuts)) for _ in range(end - start)]
    places = range(cuts[-1])
    cells = [
        [0.0 if key > query else 1.0 if owner[key] == owner[query] else 0.0 if masked else 0.5 for key in places]
        for query in places
    ]
    figure = new_figure(title, "key (the token looked at)", "query (the token that looks)", height=360)
    figure.add_trace(
        graph_objects().Heatmap(
            z=cells,
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=1,
            ygap=1,
            colorscale=[[0.0, "#F4F4F4"], [0.5, "#E69F00"], [1.0, "#0072B2"]],
            hovertemplate="query %{y}, key %{x}<extra></extra>",
        )
    )
    for cut in cuts[1:-1]:
        for line in (
            {"x0": cut - 0.5, "x1": cut - 0.5, "y0": -0.5, "y1": cuts[-1] - 0.5},
            {"y0": cut - 0.5, "y1": cut - 0.5, "x0": -0.5, "x1": cuts[-1] - 0.5},
        ):
            figure.add_shape(type="line", line={"color": "#333333", "width": 1, "dash": "dot"}, **line)
    ticks = list(range(0, cuts[-1], 5))
    figure.update_yaxes(range=[cuts[-1] - 0.5, -0.5], showgrid=False, tickvals=ticks)
    figure.update_xaxes(range=[-0.5, cuts[-1] - 0.5], showgrid=False, tickvals=ticks)
    return figure


def length_buckets(
    edges: Sequence[int], tables: Mapping[str, Sequence[float]], title: str = "", y: str = "share of tokens"
) -> Figure:
    """Bars by length bucket, one colour for each table, such as before and after sampling.

    Args:
        edges: Upper edges of all buckets but the last, in tokens.
        tables: Name to one number for each bucket; drawn as given.
        title: Title of the figure.
        y: What the numbers are.

    Raises:
        ValueError: A table without one number for each bucket.
    """
    names = [
        f"< {tokens_label(edges[0])}",
        *(f"{tokens_label(a)} - {tokens_label(b)}" for a, b in pairwise(edges)),
        f"> {tokens_label(edges[-1])}",
    ]
    figure = new_figure(title, "length of the document (tokens)", y)
    for number, (name, values) in enumerate(tables.items()):
        if len(values) != len(names):
            raise ValueError(f"{name!r} has {len(values)} numbers for {len(names)} buckets.")
        figure.add_trace(
            graph_objects().Bar(x=names, y=list(values), name=name, marker={"color": translucent(PALETTE[number], 0.9)})
        )
    if y.startswith("share"):
        figure.update_yaxes(tickformat=".0%")
    return figure


def shares(bars: Mapping[str, Mapping[str, float]], title: str = "", x: str = "tokens") -> Figure:
    """Stacked horizontal bars: the parts of each total.

    Args:
        bars: Name of each bar to its parts, in order; the same parts have the same colour in all bars.
        title: Title of the figure.
        x: What the lengths are.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    figure = new_figure(title, x, "", height=150 + 40 * len(bars))
    for number, part in enumerate(parts):
        figure.add_trace(
            graph_objects().Bar(
                orientation="h",
                y=list(bars),
                x=[bar.get(part, 0.0) for bar in bars.values()],
                name=part,
                width=0.6,
                marker={"color": translucent(PALETTE[number], 0.9)},
                hovertemplate=f"{part}: %{{x:,}}<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(tickformat=",")
    return figure
