"""Figures of tests and their results: where in a prompt the answer stands, and estimates with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ultralong.figures.theme import GREY, PALETTE, graph_objects, new_figure, plain_text, shortened

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The text, what the answer rests on, and where one has to begin to answer.
SHADES = ((0.0, "#DDE3E9"), (0.5, "#D55E00"), (1.0, "#0072B2"))
MOST_OF_NAME = 48  # characters at the left of a figure: half the width of one in a notebook
COLUMNS, MOST_CELLS = 32, 512  # of a page; a cell stands for as many tokens as it takes


def sample_map(
    tokens: int, positions: Sequence[int], title: str = "", *, most: int | None = None, everything: bool = False
) -> Figure:
    """A prompt as a page of cells, each some tokens: orange is what the answer rests on, blue the prompt's end.

    Args:
        tokens: Tokens of the prompt.
        positions: Token places of what the answer rests on, as in a sample's record.
        title: Title of the figure.
        most: Tokens of the longest prompt, where several maps have to be of one size; None takes `tokens`.
        everything: The answer rests on the whole prompt.
    """
    longest = most or tokens
    size = -(-longest // MOST_CELLS)  # tokens of a cell
    used, cells = -(-tokens // size), -(-longest // size)
    shades: list[int | None] = [int(everything)] * used + [None] * (-(-cells // COLUMNS) * COLUMNS - used)
    for place in positions:
        shades[place // size] = 1
    shades[used - 1] = 2
    rows = [shades[start : start + COLUMNS] for start in range(0, len(shades), COLUMNS)]
    across = f"cell of {size} tokens" if size > 1 else "token"
    figure = new_figure(title, f"{across} in the line", "first token of the line", height=90 + 14 * len(rows))
    figure.add_trace(
        graph_objects().Heatmap(
            z=rows,
            y=[size * COLUMNS * number for number in range(len(rows))],
            zmin=0,
            zmax=2,
            colorscale=[list(stop) for stop in SHADES],
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def forest(
    rows: Mapping[str, tuple[float, float, float]],
    title: str = "",
    *,
    x: str = "",
    zero: float | None = None,
    span: tuple[float, float] | None = None,
) -> Figure:
    """Estimates with their intervals, one a line.

    Args:
        rows: Name to (estimate, lower end, upper end), the first on top.
        title: Title of the figure.
        x: What is estimated, with its unit.
        zero: Value that means no difference, drawn as a line.
        span: Ends of the horizontal axis, which gets a little room beyond them; None fits the intervals.
    """
    figure = new_figure(title, x, "", height=110 + 26 * len(rows))
    names = [plain_text(shortened(name, MOST_OF_NAME)) for name in rows]
    ends = [end for _, low, high in rows.values() for end in (low, high, None)]
    places = [place for index in range(len(names)) for place in (index, index, None)]
    scatter = graph_objects().Scatter
    figure.add_trace(
        scatter(
            x=ends, y=places, mode="lines", line={"color": PALETTE[0], "width": 2}, hoverinfo="skip", name="interval"
        )
    )
    figure.add_trace(
        scatter(
            x=[value for value, _, _ in rows.values()],
            y=list(range(len(names))),
            mode="markers",
            marker={"color": PALETTE[0], "size": 9},
            name="estimate",
            text=[f"{plain_text(name)}: {low:.3g} to {high:.3g}" for name, (_, low, high) in rows.items()],
            hovertemplate="%{x:.3g} (%{text})<extra></extra>",
        )
    )
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5])
    low, high = span or (min(row[1] for row in rows.values()), max(row[2] for row in rows.values()))
    edge = 0.03 * (high - low) or 0.1  # room beyond the ends: a line that stops at the frame looks cut off
    figure.update_xaxes(range=[low - edge, high + edge])
    if zero is not None:
        figure.add_shape(
            type="line", x0=zero, x1=zero, y0=0, y1=1, xref="x", yref="y domain",
            line={"color": GREY, "width": 2, "dash": "dash"},
        )  # fmt: skip
    return figure.update_layout(showlegend=False)
