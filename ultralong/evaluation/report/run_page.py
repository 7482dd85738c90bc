"""The page of a run: one HTML file that opens offline, parts in reading order, empty ones left out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import yaml

from ultralong import figures
from ultralong.evaluation.report.page import duration, figure_block, page, table
from ultralong.evaluation.tasks.published.catalogue import HERE
from ultralong.evaluation.tasks.samples import GENERATED
from ultralong.figures import tokens_label
from ultralong.utils import settings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_QUOTED = 24
BOTH = ("before", "after")


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
    """The paper's own numbers, to stand beside what was measured and be named as published."""
    return settings.load(Paper, HERE / "paper.yaml").tables


def render_run(result: Mapping[str, Any], *, interactive: bool) -> str:
    """The page as a string of HTML.

    Args:
        result: As `results.summarise` gives it, with the same of another run under `before` and `compared`.
        interactive: True adds plotly's script and each figure's data.
    """
    before = result.get("before")
    draw = functools.partial(figure_block, interactive=interactive)
    sides = [result] if before is None else [before, result]
    parts = [
        _header(result, before),
        _needle(sides, draw),
        _families(sides, draw),
        _published(sides),
        _depths(sides, draw),
        _compared(result),
        _perplexity(sides, draw),
        _standard(sides),
        _failures(result),
        _paper(result),
        _notes(sides),
        _settings(result),
        _environment(result),
    ]
    return page(f"Evaluation of {result['settings']['model']}", parts, interactive=interactive)


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _beside(made: Sequence[Figure], title: str = "") -> Figure:
    return made[0] if len(made) == 1 else figures.side_by_side(made, BOTH, title=title)


def _interval(item: Mapping[str, Any]) -> str:
    return "" if item["low"] is None else f"{item['low']:.1f} to {item['high']:.1f}"


def _header(result: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
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
    if result["needle"]:
        n, correct = (sum(cell[key] for cell in result["needle"]) for key in ("n", "correct"))
        tiles.append(("needles found", f"{correct / n:.0%}", f"{correct} of {n}, {len(result['needle'])} cells"))
    if result["window"]:
        tiles.append(("window", tokens_label(result["window"]), "tokens, by the model's config"))
    seconds = sum(item["seconds"] for item in result["scores"])
    tiles.append(("answers", f"{sum(item['n'] for item in result['scores']):,}", f"in {duration(seconds)}"))
    shown = "".join(
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{escape(value)}'
        f'</span><span class="detail">{escape(detail)}</span></div>'
        for label, value, detail in tiles
    )
    versus = "" if before is None else f"<p>Before: {escape(before['settings']['model'])}.</p>"
    return f'<header><h1>{escape(result["settings"]["model"])}</h1>{versus}<div class="tiles">{shown}</div></header>'


def _needle(sides: Sequence[Mapping[str, Any]], draw: Any) -> str:
    if not all(side["needle"] for side in sides):
        sides = [side for side in sides if side["needle"]][-1:]
    if not sides:
        return ""
    made = [
        figures.needle_heatmap(side["needle"], base_window=_within(side, side["needle"]), window_name="window")
        for side in sides
    ]
    alt = "Needles found by prompt length and depth; a line marks the model's window where prompts go beyond it."
    return _section("Needle in a haystack", draw(_beside(made), alt))


def _within(side: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> int | None:
    """The window, where some of the lengths lie beyond it and some do not."""
    window, lengths = side["window"], [item["length"] for item in items]
    return window if window and min(lengths) <= window < max(lengths) else None


def _families(sides: Sequence[Mapping[str, Any]], draw: Any) -> str:
    """Curves by length of every family made at any length, and its means in a table."""
    parts = []
    for family in dict.fromkeys(
        item["family"] for side in sides for item in side["scores"] if item["task"] in GENERATED
    ):
        chosen = [
            [item for item in side["scores"] if item["family"] == family and item["task"] in GENERATED]
            for side in sides
        ]
        shown = [(side, items) for side, items in zip(sides, chosen, strict=True) if items]
        made = [
            figures.score_curves(items, base_window=_within(side, items), window_name="window") for side, items in shown
        ]
        alt = f"{family}: score by prompt length, one line a test, bars are 95% intervals."
        rows = [
            [f"{name}{item['task']}, {item['length']:,}", f"{item['score']:.1f}", _interval(item), str(item["n"])]
            for name, items in zip(_names(sides), chosen, strict=True)
            for item in items
        ]
        parts.append(
            _section(
                family,
                draw(_beside(made), alt),
                _means(sides, family),
                f"<details><summary>Every test and length</summary>"
                f"{table(['test, length', 'score', '95% interval', 'samples'], rows)}</details>",
            )
        )
    return "".join(parts)


def _names(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    return [""] if len(sides) == 1 else [f"{name}: " for name in BOTH]


def _means(sides: Sequence[Mapping[str, Any]], family: str) -> str:
    rows = [
        [f"{name}{item['length']:,}", f"{item['score']:.1f}", _interval(item), str(item["tasks"]), str(item["n"])]
        for name, side in zip(_names(sides), sides, strict=True)
        for item in side["families"]
        if item["family"] == family
    ]
    return table(["length", "mean of tests", "95% interval", "tests", "samples"], rows)


def _published(sides: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{name}{item['task']}",
            f"{item['length']:,}",
            f"{item['score']:.1f}",
            _interval(item),
            str(item["n"]),
            str(item["cut"]),
        ]
        for name, side in zip(_names(sides), sides, strict=True)
        for item in side["scores"]
        if item["task"] not in GENERATED
    ]
    if not rows:
        return ""
    families = dict.fromkeys(
        item["family"] for side in sides for item in side["scores"] if item["task"] not in GENERATED
    )
    means = "".join(f"<h3>{escape(family)}: means</h3>{_means(sides, family)}" for family in families)
    return _section(
        "Published texts",
        table(["set", "cut to (tokens)", "score", "95% interval", "samples", "lost their middle"], rows),
        means,
    )


def _depths(sides: Sequence[Mapping[str, Any]], draw: Any) -> str:
    shown = [side for side in sides if side["depths"]]
    if not shown:
        return ""
    made = [
        figures.needle_heatmap(side["depths"], base_window=_within(side, side["depths"]), window_name="window")
        for side in shown
    ]
    alt = "Score by prompt length and depth, over all tests whose answer rests on one place; cells hold right and all."
    return _section("By depth", draw(_beside(made), alt))


def _compared(result: Mapping[str, Any]) -> str:
    if "compared" not in result:
        return ""
    if not result["compared"]:
        return _section("Before and after", f"<p>{escape(result['not_compared'])}</p>")
    rows = [
        [
            f"{row['task']}, {row['length']:,}",
            f"{row['first']:.1f}",
            f"{row['second']:.1f}",
            f"{row['difference']:+.1f}",
            "" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}",
            str(row["n"]),
        ]
        for row in result["compared"]
    ]
    head = ["test, length", "before", "after", "difference", "95% interval", "same samples"]
    return _section("Before and after, sample by sample", table(head, rows))


def _perplexity(sides: Sequence[Mapping[str, Any]], draw: Any) -> str:
    parts = []
    for by, name in (("row", "position in the row"), ("document", "distance from the document's start")):
        curves = {
            side["settings"]["model"] if len(sides) == 1 else label: side["perplexity"][by]
            for label, side in zip(BOTH, sides, strict=False)
            if side["perplexity"]
        }
        if curves:
            parts.append(
                draw(
                    figures.perplexity_curve(curves),
                    f"Perplexity by {name}; bands are 95% bootstrap intervals over rows.",
                )
            )
    return _section("Perplexity", *parts) if parts else ""


def _standard(sides: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{name}{row['task']}",
            row["metric"],
            f"{row['score']:.2f}",
            "" if row["stderr"] is None else f"{row['stderr']:.2f}",
            str(row["n"]),
        ]
        for name, side in zip(_names(sides), sides, strict=True)
        if side["standard"]
        for row in side["standard"]["scores"]
    ]
    return (
        _section(
            "Short benchmarks, by lm-eval", table(["benchmark", "metric", "score", "standard error", "samples"], rows)
        )
        if rows
        else ""
    )


def _failures(result: Mapping[str, Any]) -> str:
    wrong = [
        [f"needle, {cell['length']:,}, depth {cell['depth']:.0%}", str(item["expected"]), str(item["got"])]
        for cell in result["needle"]
        for item in cell.get("wrong", ())[:1]
    ][: MOST_QUOTED // 4]
    rows = [
        [f"{item['task']}, {item['length']:,}, sample {item['index']}", item["expected"], item["got"]]
        for item in result["failures"]
    ]
    # A few of every test say more than many of one.
    step = max(1, len(rows) // MOST_QUOTED)
    rows = wrong + rows[::step][:MOST_QUOTED]
    if not rows:
        return ""
    return _section(
        "What it got wrong",
        table(["where", "expected", "answered"], rows, numbers=False),
        "<p>All answers are in the run's folder, one a line.</p>",
    )


def _paper(result: Mapping[str, Any]) -> str:
    ours = dict(result["paper_means"])
    ours |= {row["task"]: row["score"] for row in (result["standard"] or {}).get("scores", ())}
    parts = []
    for item in paper_tables():
        rows = [[f"{model} (published)", *(f"{value:g}" for value in values)] for model, values in item.rows.items()]
        if any(column in ours for column in item.columns):
            rows.append(
                [
                    f"{result['settings']['model']} (measured here)",
                    *(f"{ours[column]:.1f}" if column in ours else "" for column in item.columns),
                ]
            )
        parts.append(f"<h3>{escape(item.title)}</h3>{table(['model', *item.columns], rows)}")
    note = (
        "<p>From the tables of arXiv 2504.06214. They were measured with other prompts and engines; differences of "
        "a few points between harnesses are normal, so compare differences within one harness. A mean over lengths "
        "hides the longest ones, where the claim is: read the curves above.</p>"
    )
    return (
        f"<section><details><summary>The paper's own numbers, as published</summary>{''.join(parts)}{note}"
        "</details></section>"
    )


def _notes(sides: Sequence[Mapping[str, Any]]) -> str:
    side = sides[-1]
    notes = [f"{family}: text from {', '.join(sources)}." for family, sources in side["sources"].items()]
    left_out = side["skipped"] | (side["standard"] or {}).get("skipped", {})
    notes += [f"{task} was left out: {reason}" for task, reason in left_out.items()]
    if side["effective"] is not None:
        notes.append(
            f"Effective length is the longest measured one up to which RULER's mean stays at "
            f"{side['effective']['bar']} or more, the score of Llama-2-7B-chat at 4K (RULER, section 4)."
        )
    notes.append(
        "Right-or-wrong scores have Wilson's interval, others a bootstrap over samples; means over tests join "
        "their tests' intervals."
    )
    return _section("How to read this", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")


def _settings(result: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(result["settings"], sort_keys=False, allow_unicode=True)
    return (
        f"<section><details><summary>Every setting of the run</summary><pre><code>{escape(text)}</code></pre>"
        "</details></section>"
    )


def _environment(result: Mapping[str, Any]) -> str:
    return (
        _section("Where it ran", table(["what", "value"], result["environment"].items(), numbers=False))
        if result["environment"]
        else ""
    )
