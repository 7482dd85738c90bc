"""Figures of attention over several ranks: who holds which tokens, who works when, who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ultralong.figures.theme import PALETTE, graph_objects, new_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUES = ((0.0, "#F4F6F8"), (1.0, "#0072B2"))


def token_ownership(layouts: Mapping[str, Sequence[int]], title: str = "", *, ranks: int) -> Figure:
    """A strip of tokens for each layout, coloured and numbered by the rank that holds them.

    Args:
        layouts: Name of the layout to the rank of every token, in the row's order.
        title: Title of the figure.
        ranks: Number of ranks.
    """
    names = list(layouts)
    few = len(names) <= 3 and max(map(len, layouts.values())) <= 80  # numbers are readable
    figure = new_figure(title, "token", "", height=90 + (62 if few else 26) * len(names))
    scale = [(i / max(1, ranks - 1), PALETTE[i % len(PALETTE)]) for i in range(ranks)]
    rows = [list(layouts[name]) for name in names]
    figure.add_trace(
        graph_objects().Heatmap(
            z=rows,
            y=names,
            zmin=0,
            zmax=max(1, ranks - 1),
            colorscale=scale if ranks > 1 else [(0.0, PALETTE[0]), (1.0, PALETTE[0])],
            showscale=False,
            text=[[str(rank) for rank in row] if few else _named_runs(row) for row in rows],
            texttemplate="%{text}",
            xgap=1 if few else 0,
            ygap=6 if few else 2,
        )
    )
    return figure.update_yaxes(autorange="reversed")


def _named_runs(row: Sequence[int]) -> list[str]:
    """The rank in the middle of each run of its tokens, as colour alone does not tell ranks apart."""
    named, start = [""] * len(row), 0
    for end in range(1, len(row) + 1):
        if end == len(row) or row[end] != row[start]:
            named[(start + end - 1) // 2] = str(row[start])
            start = end
    return named


def work_of_ranks(pairs: Sequence[float], title: str = "", *, most: float | None = None) -> Figure:
    """Bars of the work that each rank does at one moment.

    Args:
        pairs: Query-key pairs, by rank.
        title: Title of the figure.
        most: Top of the axis, the same for all moments; None takes the largest.
    """
    figure = new_figure(title, "rank", "query-key pairs", height=300)
    figure.add_trace(
        graph_objects().Bar(x=[str(rank) for rank in range(len(pairs))], y=list(pairs), marker={"color": PALETTE[0]})
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.08 * (most or max(pairs) or 1)], title_standoff=14)
    figure.update_layout(showlegend=False)
    return figure


def rank_timeline(pairs: Sequence[Sequence[float]], title: str = "") -> Figure:
    """Ranks against hops: a cell is what a rank computes at a hop; pale cells wait.

    Args:
        pairs: For every rank its query-key pairs by hop.
        title: Title of the figure.
    """
    figure = new_figure(title, "hop", "", height=110 + 46 * len(pairs))
    figure.add_trace(
        graph_objects().Heatmap(
            z=[list(row) for row in pairs],
            x=[str(hop) for hop in range(len(pairs[0]))],
            y=[f"rank {rank}" for rank in range(len(pairs))],
            zmin=0,
            zmax=max(max(row) for row in pairs),
            colorscale=[list(stop) for stop in BLUES],
            showscale=False,
            text=[[f"{value:g}" if value else "waits" for value in row] for row in pairs],
            texttemplate="%{text}",
            xgap=3,
            ygap=3,
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(autorange="reversed")
    return figure


def shares_of_one(rates: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """Bars of each scheme's rate per GPU relative to one GPU's.

    Args:
        rates: Name of the kernel to the share, 0 to 1, of each scheme.
        title: Title of the figure; say the length, the hardware and the date.
    """
    figure = new_figure(title, "", "% of one GPU's rate", height=340)
    for index, (kernel, schemes) in enumerate(rates.items()):
        figure.add_trace(
            graph_objects().Bar(
                name=kernel,
                x=list(schemes),
                y=[100 * share for share in schemes.values()],
                text=[f"{100 * share:.0f}" for share in schemes.values()],
                marker={"color": PALETTE[index % len(PALETTE)]},
            )
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[0, 112])
    return figure


def traffic(sent: Sequence[Sequence[float]], title: str = "", *, unit: str = "bytes") -> Figure:
    """Bytes that each rank sends to each other rank.

    Args:
        sent: For every sending rank what it sends to each rank.
        title: Title of the figure.
        unit: Unit of the cells.
    """
    figure = new_figure(title, f"to rank ({unit})", "from rank", height=150 + 42 * len(sent))
    ranks = [str(rank) for rank in range(len(sent))]
    figure.add_trace(
        graph_objects().Heatmap(
            z=[list(row) for row in sent],
            x=ranks,
            y=ranks,
            zmin=0,
            zmax=max(max(row) for row in sent) or 1,
            colorscale=[list(stop) for stop in BLUES],
            showscale=False,
            text=[[f"{value:,.0f}" for value in row] for row in sent],
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure
