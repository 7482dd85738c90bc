"""The page of a run: one HTML file that opens offline, parts in reading order, empty ones left out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.evaluation.report.page import (
    Drawer,
    duration,
    render_page,
    settings_text,
)
from ultralong.evaluation.report.parts import Section, Side, Table
from ultralong.evaluation.report.sections import section_list
from ultralong.evaluation.tasks.published.catalogue import HERE
from ultralong.figures import tokens_label
from ultralong.utils import settings
from ultralong.utils.files import write_text

MOST_QUOTED = 24


@dataclass(frozen=True)
class PaperTable:
    """A published table: `rows` from a model to its values, one a column."""

    title: str
    columns: list[str]
    rows: dict[str, list[float]]


@dataclass(frozen=True)
class Paper:
    """The paper's tables."""

    tables: list[PaperTable]


@functools.cache
def paper_tables() -> list[PaperTable]:
    """The paper's own numbers, shown beside what was measured and named as published."""
    return settings.load(Paper, HERE / "paper.yaml").tables


def draw_run(result: Mapping[str, Any], folder: Path, *, interactive: bool = True) -> Path:
    """Write the page of a run beside its numbers.

    Args:
        result: As `results.summarise` gives it, with the same of another run under `before` and `compared`.
        folder: Folder of the run.
        interactive: True adds plotly's script and each figure's data.

    Returns:
        Path of the page.
    """
    page = Path(folder) / "report.html"
    write_text(page, render_run(result, interactive=interactive))
    return page


def render_run(result: Mapping[str, Any], *, interactive: bool) -> str:
    """The page as a string of HTML. See `draw_run` for the arguments."""
    before = result.get("before")
    draw = Drawer(interactive)
    sides = [Side.of(result, "")] if before is None else [Side.of(before, "before"), Side.of(result, "after")]
    values = {
        "title": f"Evaluation of {result['settings']['model']}",
        "model": result["settings"]["model"],
        "described": _described(result),
        "before": before and before["settings"]["model"],
        "tiles": _tiles(result, before, sides[-1]),
        "no_figures": draw.missing,
        "sections": [*section_list(sides, result, draw), *_failures(result, sides[-1])],
        "paper": _paper(result, sides[-1]),
        "notes": _notes(sides[-1]),
        "settings": settings_text(result["settings"]),
        "environment": {key: value for key, value in result["environment"].items() if isinstance(value, str)},
    }
    return render_page("run.html.j2", values, interactive=interactive)


def _described(result: Mapping[str, Any]) -> str:
    """What the model is, as its own config says: a folder's name alone would fit any model."""
    return str(result["environment"].get("model") or "")


def _tiles(result: Mapping[str, Any], before: Mapping[str, Any] | None, side: Side) -> list[tuple[str, str, str]]:
    tiles = []
    if result["effective"] is not None:
        reached, bar = result["effective"]["length"], result["effective"]["bar"]
        old = before and before["effective"]
        start = "" if not old else f"{tokens_label(old['length']) if old['length'] else 'none'} \u2192 "
        tiles.append(
            (
                "effective length (RULER)",
                start + (tokens_label(reached) if reached else "none"),
                f"longest with a mean of {bar} or more up to it, {result['effective']['tasks']} of 13 tests",
            )
        )
    if side.needle is not None:
        found = round(side.needle.value * side.needle.n / 100)
        cells = f"{found} of {side.needle.n}, {len(side.needle.by_depth)} cells"
        tiles.append(("needles found", f"{side.needle.value:.0f}%", cells))
    if side.window:
        tiles.append(("window", tokens_label(side.window), "tokens, by the model's config"))
    parts = [part for result in side.scores for part in result.by_length]
    if parts:
        seconds = sum(part.details.get("seconds", 0.0) for part in parts)
        tiles.append(("answers", f"{sum(part.n for part in parts):,}", f"in {duration(seconds)}"))
    return tiles


def _failures(result: Mapping[str, Any], side: Side) -> list[Section]:
    wrong = [
        [f"needle, {part.length:,}, depth {part.depth:.0%}", str(item["expected"]), str(item["got"])]
        for part in (side.needle.by_depth if side.needle is not None else ())
        for item in part.details.get("wrong", ())[:1]
    ][: MOST_QUOTED // 4]
    rows = [
        [f"{item['task']}, {item['length']:,}, sample {item['index']}", item["expected"], item["got"]]
        for item in result["failures"]
        if "asked" not in item
    ]
    own = [
        [f"{item['task']}, {item['length']:,}, {item['id'][:40]}", item["asked"], item["expected"], item["got"]]
        for item in result["failures"]
        if "asked" in item
    ]
    quoted = [
        Table(("where", "expected", "answered"), wrong + _some(rows), numbers=False),
        Table(("where", "asked", "expected", "answered"), _some(own), numbers=False),
    ]
    tables = [table for table in quoted if table.rows]
    if not tables:
        return []
    return [Section("What it got wrong", tables=tables, texts=["All answers are in the run's folder, one a line."])]


def _some(rows: list[list[str]]) -> list[list[str]]:
    """As many as are quoted: a few of every test say more than many of one."""
    return rows[:: max(1, len(rows) // MOST_QUOTED)][:MOST_QUOTED]


def _paper(result: Mapping[str, Any], side: Side) -> list[Table]:
    ours = dict(result["paper_means"]) | {item.task: item.value for item in side.benchmarks}
    tables = []
    for item in paper_tables():
        rows = [[f"{model} (published)", *(f"{value:g}" for value in values)] for model, values in item.rows.items()]
        if any(column in ours for column in item.columns):
            measured = (f"{ours[column]:.1f}" if column in ours else "" for column in item.columns)
            rows.append([f"{result['settings']['model']} (measured here)", *measured])
        tables.append(Table(("model", *item.columns), rows, item.title))
    return tables


def _notes(side: Side) -> list[str]:
    notes = [f"{family}: text from {', '.join(sources)}." for family, sources in side.summary["sources"].items()]
    notes += [f"{task} was left out: {reason}" for task, reason in side.summary["skipped"].items()]
    effective = side.summary["effective"]
    if effective is not None:
        notes.append(
            f"Effective length is the longest measured one up to which RULER's mean stays at {effective['bar']} or "
            "more, the score of Llama-2-7B-chat at 4K (RULER, section 4)."
        )
    notes.append(
        "Right-or-wrong scores have Wilson's interval, others a bootstrap over samples; means over tests join "
        "their tests' intervals. One sample has no interval: n = 1 stands in its place."
    )
    return notes
