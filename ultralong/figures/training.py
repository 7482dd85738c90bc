"""Figures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ultralong.figures.theme import DASHES, PALETTE, graph_objects, new_figure, translucent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def loss_curve(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    *,
    x: str = "step",
    y: str = "loss (nats per token)",
    smoothing: float = 0.0,
) -> Figure:
    """Training loss, one line a run.

    Args:
        runs: Name of the run to its (step or tokens, loss in nats per token) pairs, in order.
        title: Title of the figure.
        x: What the first number of each pair is.
        y: Title of the vertical axis, with its unit.
        smoothing: Weight in [0, 1) of the past in an exponential mean, corrected for its start; above 0 the raw
            values stay visible as a faint line.

    Raises:
        ValueError: `smoothing` lies outside [0, 1).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}.")
    figure = new_figure(title, x, y, height=340)
    scatter = graph_objects().Scatter
    for index, (name, points) in enumerate(runs.items()):
        colour = PALETTE[index % len(PALETTE)]
        steps, losses = [point[0] for point in points], [point[1] for point in points]
        if smoothing:
            figure.add_trace(
                scatter(
                    x=steps,
                    y=losses,
                    mode="lines",
                    showlegend=False,
                    hoverinfo="skip",
                    line={"color": translucent(colour, 0.3), "width": 1},
                )
            )
            losses = _exponential_mean(losses, smoothing)
        figure.add_trace(
            scatter(
                x=steps,
                y=losses,
                name=name,
                mode="lines",
                line={"color": colour, "dash": DASHES[index % len(DASHES)], "width": 2},
                hovertemplate="%{x}: %{y:.4f}<extra>" + name + "</extra>",
            )
        )
    figure.update_layout(showlegend=True)
    return figure


def _exponential_mean(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean whose first values are not drawn towards zero (Adam's bias correction)."""
    mean, total, smooth = 0.0, 0.0, []
    for value in np.asarray(values, float):
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smooth.append(float(mean / total))
    return smooth
