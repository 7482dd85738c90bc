"""The part of a run's page that shows scores by capability and length, with the area under each curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ultralong import figures
from ultralong.evaluation.measures.result import Part, interval_text
from ultralong.evaluation.report.page import Drawer
from ultralong.evaluation.report.parts import Section, Side, Table
from ultralong.evaluation.report.table import area_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MEAN_HEADS = ("mean of tests", "95% interval", "tests", "samples")


def capability_sections(sides: Sequence[Side], draw: Drawer) -> list[Section]:
    """One curve a capability over the length, and a table of the values; nothing without tests made at every length.

    Args:
        sides: One run, or the one before and the one after.
        draw: Draws the figures.
    """
    shown = [side for side in sides if side.summary["capabilities"]]
    if not shown:
        return []
    alt = (
        "Score by capability and prompt length: the mean of the capability's tests, bars are 95% intervals, AUC is the "
        "area under the curve over the logarithm of length, 100 at most."
    )
    drawn = draw(alt, *(partial(_curves, side) for side in shown), names=[side.name for side in shown])
    areas = [
        [f"{side.lead}{item['capability']}", area_text(item), str(item["tasks"])]
        for side in shown
        for item in side.summary["areas"]
    ]
    rows = [
        [f"{side.lead}{item['capability']}, {item['length']:,}", *mean_cells(item)]
        for side in shown
        for item in side.summary["capabilities"]
    ]
    values = Table(("capability, length", *MEAN_HEADS), rows, "Values", folded=True)
    under = [Table(("capability", "area under the curve", "tests"), areas)] if areas else []
    return [Section("By capability and length", [drawn], [*under, values])]


def mean_cells(item: Mapping[str, Any]) -> list[str]:
    """A mean of tests as the cells of a table's row, under `MEAN_HEADS`."""
    return [
        f"{item['score']:.1f}",
        interval_text(Part(item["score"], item["n"], item["low"], item["high"])),
        str(item["tasks"]),
        str(item["n"]),
    ]


def _curves(side: Side) -> Figure:
    areas = {item["capability"]: f" (AUC {item['score']:.0f})" for item in side.summary["areas"]}
    rows = [
        {**item, "task": item["capability"] + areas.get(item["capability"], "")}
        for item in side.summary["capabilities"]
    ]
    return figures.score_curves(rows, **side.mark([Part(row["score"], row["n"], length=row["length"]) for row in rows]))
