"""The result of a run in two files: `report.json` for programs, `report.html` for people.

The page opens offline and needs nothing beside it. Every figure is a still picture first; where scripts run, it becomes
interactive. Every share stands with its count and its interval, and what went wrong is quoted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ultralong import figures
from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.report.page import Drawer, Drawn, duration, render_page, settings_text
from ultralong.figures import tokens_label
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import write_json, write_text

MOST_QUOTED = 12


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
        needle_rescaled: The same with RoPE rescaled and nothing trained; what it finds, training did not bring.
        perplexity: Name of each model to its bins, as `perplexity_by_position` returns them.
        losses: Name of each training stage to its (step, loss) pairs.
        packed_rows: Document boundaries of a few packed rows, from 0 to the row's length.
        facts: Short labelled facts for the table on top, such as tokens trained on.
        settings: Every setting that reproduces the run, nested as it is.
        commands: Command lines to continue with, each with what it does.
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
    needle_rescaled: Sequence[Mapping[str, Any]] = ()
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
    """Needles found inside the old window and beyond it, before and after, and with RoPE rescaled alone if measured."""
    rescaled = [("rescaled", data.needle_rescaled)] if data.needle_rescaled else []
    return {
        f"{when}_{where}": count_needles(cells, *span)
        for when, cells in (("before", data.needle_before), *rescaled, ("after", data.needle_after))
        for where, span in (("inside", (0, data.base_window)), ("beyond", (data.base_window, data.target_window)))
    }


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, a figure, and a table that can be unfolded."""

    title: str
    figure: Drawn | None
    summary: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


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


def render(data: ReportData, summary: Mapping[str, Any], *, interactive: bool) -> str:
    """The whole page as one string of HTML.

    Args:
        data: What to tell.
        summary: Needles found inside and beyond the old window, before and after.
        interactive: True adds plotly's script and each figure's data.
    """
    draw = Drawer(interactive)
    wrong = [
        [f"{cell['length']:,} tokens, depth {cell['depth']:.0%}", str(item["expected"]), str(item["got"])]
        for cell in data.needle_after
        for item in cell.get("wrong", ())
    ]
    values = {
        "title": data.title,
        "tiles": _tiles(data, summary),
        "facts": {"checkpoint": data.checkpoint, **data.facts},
        "sections": _sections(data, draw),
        "failures": wrong[:MOST_QUOTED],
        "more_failures": max(0, len(wrong) - MOST_QUOTED),
        "commands": data.commands,
        "notes": [*data.notes, *([f"Figures are left out: {draw.missing}"] if draw.missing else [])],
        "settings": settings_text(data.settings),
        "environment": data.environment,
    }
    return render_page("report.html.j2", values, interactive=interactive)


def _tiles(data: ReportData, summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after = summary["before_beyond"], summary["after_beyond"]
    tiles = [("window", f"{tokens_label(data.base_window)} \u2192 {tokens_label(data.target_window)}", "tokens")]
    if after is not None:
        start = "" if before is None else f"{before['share']:.0%} "
        rescaled = summary.get("rescaled_beyond")
        alone = "" if rescaled is None else f"; rescaled only, nothing trained: {_share(rescaled)}"
        tiles.append(
            (
                "needles found beyond the old window",
                f"{start}\u2192 {after['share']:.0%}",
                f"{_share(before)} \u2192 {_share(after)}{alone}",
            )
        )
    return [*tiles, ("time", duration(data.seconds), "the whole run")]


def _share(count: Mapping[str, Any] | None) -> str:
    return "not measured" if count is None else f"{count['correct']} of {count['n']}"


def _sections(data: ReportData, draw: Drawer) -> list[Section]:
    sections = [_needle(data, draw), _perplexity(data, draw)]
    if data.losses:
        figure = draw("Training loss by step, one line a stage.", lambda: figures.loss_curve(data.losses))
        sections.append(Section("Training", figure))
    if data.packed_rows:
        alt = f"{len(data.packed_rows)} packed rows: each block is a document, or a part of one."
        sections.append(Section("What it was trained on", draw(alt, lambda: figures.packed_row(data.packed_rows))))
    return [section for section in sections if section is not None]


def _needle(data: ReportData, draw: Drawer) -> Section | None:
    sides = {"before": data.needle_before, "rescaled only": data.needle_rescaled, "after": data.needle_after}
    if not data.needle_rescaled:
        del sides["rescaled only"]
    shown = {name: cells for name, cells in sides.items() if cells}
    if not shown:
        return None
    alt = "Needles found by prompt length and depth{}; the line marks the old window."
    figure = draw(
        alt.format(f", {', '.join(shown)}" if len(shown) > 1 else ""),
        *(partial(figures.needle_heatmap, cells, base_window=data.base_window) for cells in shown.values()),
        names=tuple(shown) if len(shown) > 1 else ("",),
    )
    rows = []
    for length in sorted({cell["length"] for cells in shown.values() for cell in cells}):
        row = [f"{length:,}" + ("" if length <= data.base_window else " (beyond)")]
        for cells in sides.values():
            chosen = [cell for cell in cells if cell["length"] == length]
            n, correct = sum(cell["n"] for cell in chosen), sum(cell["correct"] for cell in chosen)
            row += [f"{correct} of {n}", _interval(correct, n)] if n else ["", ""]
        rows.append(row)
    head = ("prompt and answer (tokens)", *(text for name in sides for text in (name, "95% interval")))
    return Section("Needle in a haystack", figure, "Counts by length", head, rows)


def _interval(correct: int, n: int) -> str:
    if n < 2:
        return f"n = {n}"
    low, high = wilson(correct, n)
    return f"{low:.0%} to {high:.0%}"


def _perplexity(data: ReportData, draw: Drawer) -> Section | None:
    if not data.perplexity:
        return None
    figure = draw(
        "Perplexity by position in the row; bands are 95% bootstrap intervals over rows.",
        lambda: figures.perplexity_curve(data.perplexity, base_window=data.base_window),
    )
    rows = [
        [
            f"{name}, {item['start']:,} to {item['end']:,}",
            f"{item['perplexity']:.2f}",
            f"n = {item.get('rows', 1)}" if item["low"] is None else f"{item['low']:.2f} to {item['high']:.2f}",
            f"{item['n']:,}",
        ]
        for name, bins in data.perplexity.items()
        for item in bins
    ]
    return Section(
        "Perplexity by position", figure, "Values", ("model, positions", "perplexity", "95% interval", "tokens"), rows
    )
