"""The result of a run in two files: `report.json` for programs, `report.html` for people.

The page opens offline and needs nothing beside it. Every figure is a still picture first; where scripts run, it becomes
interactive. Every share stands with its count and its interval, and what went wrong is quoted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.report.page import render
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import write_json, write_text


@dataclass(frozen=True)
class ReportData:
    """What a report tells. A part left empty is left out of the page.

    Attributes:
        title: Title of the page.
        base_window: Window before, in tokens.
        target_window: Window after, in tokens.
        seconds: Wall-clock time of the whole run.
        checkpoint: Where the extended model lies, as the reader should type it.
        needle_before: Needle cells of the model before, as `needle_grid` returns them.
        needle_after: The same after.
        perplexity: Name of each model to its bins, as `perplexity_by_position` returns them.
        losses: Name of each training stage to its (step, loss) pairs.
        packed_rows: Document boundaries of a few packed rows, from 0 to the row's length.
        facts: Short labelled facts for the table on top, such as tokens trained on.
        settings: Every setting that reproduces the run, nested as it is.
        commands: Command lines to go on with, each with what it does.
        notes: Sentences on what the numbers do and do not show.
        environment: Machine, versions and date; `describe_environment()` unless given.
    """

    title: str
    base_window: int
    target_window: int
    seconds: float
    checkpoint: str
    needle_before: Sequence[Mapping[str, Any]] = ()
    needle_after: Sequence[Mapping[str, Any]] = ()
    perplexity: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    packed_rows: Sequence[Sequence[int]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: describe_environment())


def count_needles(cells: Sequence[Mapping[str, Any]], shortest: int, longest: int) -> dict[str, Any] | None:
    """Needles found over all cells whose length lies in (shortest, longest].

    Returns:
        `n`, `correct`, `share`, `low`, `high` (Wilson, 95%), `cells` and `cells_found` (those with every needle found),
        or None where no cell lies in the range.
    """
    chosen = [cell for cell in cells if shortest < cell["length"] <= longest]
    if not chosen:
        return None
    n, correct = sum(cell["n"] for cell in chosen), sum(cell["correct"] for cell in chosen)
    low, high = wilson(correct, n)
    return {
        "n": n,
        "correct": correct,
        "share": correct / n,
        "low": low,
        "high": high,
        "cells": len(chosen),
        "cells_found": sum(cell["correct"] == cell["n"] for cell in chosen),
    }


def summarise(data: ReportData) -> dict[str, Any]:
    """Needles found inside the old window and beyond it, before and after."""
    return {
        f"{when}_{where}": count_needles(cells, *span)
        for when, cells in (("before", data.needle_before), ("after", data.needle_after))
        for where, span in (("inside", (0, data.base_window)), ("beyond", (data.base_window, data.target_window)))
    }


def write_report(folder: str | os.PathLike[str], data: ReportData, *, interactive: bool = True) -> Path:
    """Write `report.json` and `report.html` into a folder, each whole or not at all.

    Args:
        folder: Made when missing.
        data: What to tell.
        interactive: True puts plotly's script into the page (compressed, 2 MB), so that figures can be explored
            offline; False leaves the still pictures (below 1 MB).

    Returns:
        Path of the page.

    Raises:
        ValueError: A window or time that cannot be.
    """
    if not 0 < data.base_window <= data.target_window:
        raise ValueError(
            f"A report needs 0 < base_window <= target_window, got {data.base_window} and {data.target_window}."
        )
    if data.seconds < 0:
        raise ValueError(f"A run cannot have taken {data.seconds} seconds.")
    folder = Path(folder)
    summary = summarise(data)
    write_json(folder / "report.json", asdict(data) | {"summary": summary})
    page = folder / "report.html"
    write_text(page, render(data, summary, interactive=interactive))
    return page
