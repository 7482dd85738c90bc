"""Parts of a run's page as data: titles, figures, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ultralong import figures
from ultralong.evaluation.measures.result import Part, Result, grid_cells, interval_text, position_bins
from ultralong.evaluation.report.capabilities import MEAN_HEADS, capability_sections, mean_cells
from ultralong.evaluation.report.page import Drawer, Drawn, model_label
from ultralong.evaluation.report.parts import Section, Side, Table
from ultralong.evaluation.report.table import contained_text
from ultralong.evaluation.tasks.groups import FAMILIES
from ultralong.evaluation.tasks.own.own_task import is_own
from ultralong.evaluation.tasks.samples import GENERATED

MOST_BESIDE = 6  # lines of a figure that reads well at half the page's width

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def section_list(sides: Sequence[Side], result: Mapping[str, Any], draw: Drawer) -> list[Section]:
    """The parts that show what was measured, in reading order.

    Args:
        sides: One run, or the one before and the one after.
        result: Summary of the last of them.
        draw: Draws the figures.
    """
    return [
        *_needle(sides, draw),
        *capability_sections(sides, draw),
        *_families(sides, draw),
        *_published(sides),
        *_own_questions(sides),
        *_depths(sides, draw),
        *_compared(result),
        *_perplexity(sides, draw),
        *_longppl(sides),
        *_loss(sides),
        *_benchmarks(sides),
    ]


def _heatmap(parts: Sequence[Part], side: Side) -> Callable[[], Figure]:
    return partial(figures.needle_heatmap, grid_cells(parts), **side.mark(parts))


def _needle(sides: Sequence[Side], draw: Drawer) -> list[Section]:
    found = [(side, side.needle) for side in sides]
    both = [(side, needle) for side, needle in found if needle is not None]
    if len(both) < len(found):
        both = both[-1:]
    if not both:
        return []
    alt = "Needles found by prompt length and depth; a line marks the model's window where prompts go beyond it."
    drawn = draw(
        alt, *(_heatmap(needle.by_depth, side) for side, needle in both), names=[side.name for side, _ in both]
    )
    rows = [
        [f"{side.lead}{part.length:,}", f"{part.value:.1f}", interval_text(part), str(part.n)]
        for side, needle in both
        for part in needle.by_length
    ]
    head = ("prompt and answer (tokens)", "found (per cent)", "95% interval", "needles")
    texts = [side.lead + text for side, needle in both if (text := contained_text(needle))]
    return [Section("Needle in a haystack", [drawn], [Table(head, rows, "By length", folded=True)], texts)]


def _families(sides: Sequence[Side], draw: Drawer) -> list[Section]:
    """Curves by length of every family made at any length, and its means in a table."""
    sections = []
    for family in dict.fromkeys(
        FAMILIES.get(score.task, score.task) for side in sides for score in side.scores if score.task in GENERATED
    ):
        chosen = [[score for score in side.scores if FAMILIES.get(score.task, score.task) == family] for side in sides]
        shown = [(side, scores) for side, scores in zip(sides, chosen, strict=True) if scores]
        alt = f"{family}: score by prompt length, one line a test, bars are 95% intervals."
        drawn = draw(
            alt,
            *(partial(_curves, side, scores) for side, scores in shown),
            names=[side.name for side, _ in shown],
            stacked=max(len(scores) for _, scores in shown) > MOST_BESIDE,
        )
        rows = [
            [f"{side.lead}{score.task}, {part.length:,}", f"{part.value:.1f}", interval_text(part), str(part.n)]
            for side, scores in zip(sides, chosen, strict=True)
            for score in scores
            for part in score.by_length
        ]
        every = Table(("test, length", "score", "95% interval", "samples"), rows, "Every test and length", folded=True)
        sections.append(Section(family, [drawn], [_means(sides, family), every]))
    return sections


def _curves(side: Side, scores: Sequence[Result]) -> Figure:
    rows = [
        {"task": score.task, "length": part.length, "score": part.value, "low": part.low, "high": part.high}
        for score in scores
        for part in score.by_length
    ]
    return figures.score_curves(rows, **side.mark([part for score in scores for part in score.by_length]))


def _means(sides: Sequence[Side], family: str, title: str = "") -> Table:
    rows = [
        [f"{side.lead}{item['length']:,}", *mean_cells(item)]
        for side in sides
        for item in side.summary["families"]
        if item["family"] == family
    ]
    return Table(("length", *MEAN_HEADS), rows, title)


def _published(sides: Sequence[Side]) -> list[Section]:
    found = [
        (side, score)
        for side in sides
        for score in side.scores
        if score.task not in GENERATED and not is_own(score.task)
    ]
    if not found:
        return []
    rows = [
        [
            f"{side.lead}{score.task}",
            f"{part.length:,}",
            f"{part.value:.1f}",
            interval_text(part),
            str(part.n),
            str(part.details.get("cut", 0)),
        ]
        for side, score in found
        for part in score.by_length
    ]
    head = ("set", "cut to (tokens)", "score", "95% interval", "samples", "lost their middle")
    families = dict.fromkeys(FAMILIES.get(score.task, score.task) for _, score in found)
    means = [_means(sides, family, f"{family}: means") for family in families]
    return [Section("Published texts", tables=[Table(head, rows), *means])]


def _own_questions(sides: Sequence[Side]) -> list[Section]:
    """Scores of files of questions; a length holds other questions than the next, so that no curve joins them."""
    rows = [
        [f"{side.lead}{score.task}, {part.length:,}", f"{part.value:.1f}", interval_text(part), str(part.n)]
        for side in sides
        for score in side.scores
        if is_own(score.task)
        for part in score.by_length
    ]
    head = ("file, smallest length that holds the question", "score", "95% interval", "questions")
    return [Section("Own questions", tables=[Table(head, rows)])] if rows else []


def _depths(sides: Sequence[Side], draw: Drawer) -> list[Section]:
    shown = [(side, parts) for side in sides if (parts := join_depths(side.scores))]
    if not shown:
        return []
    alt = "Score by prompt length and depth, over all tests whose answer rests on one place; cells hold right and all."
    drawn = draw(alt, *(_heatmap(parts, side) for side, parts in shown), names=[side.name for side, _ in shown])
    return [Section("By depth", [drawn])] if drawn is not None else []


def join_depths(scores: Sequence[Result]) -> list[Part]:
    """Parts by length and depth over several tests, each sample counted once."""
    cells: dict[tuple[int, float], list[Part]] = {}
    for score in scores:
        for part in score.by_depth:
            cells.setdefault((part.length or 0, part.depth or 0.0), []).append(part)
    joined = []
    for (length, depth), parts in sorted(cells.items()):
        n = sum(part.n for part in parts)
        joined.append(Part(sum(part.value * part.n for part in parts) / n, n, length=length, depth=depth))
    return joined


def _compared(result: Mapping[str, Any]) -> list[Section]:
    if "compared" not in result:
        return []
    if not result["compared"]:
        return [Section("Before and after", texts=[result["not_compared"]])]
    rows = [
        [
            row["task"] if row["length"] is None else f"{row['task']}, {row['length']:,}",
            f"{row['first']:.1f}",
            f"{row['second']:.1f}",
            f"{row['difference']:+.1f}",
            interval_text(Part(row["difference"], row["n"], row["low"], row["high"]), "{:+.1f}"),
            str(row["n"]),
        ]
        for row in result["compared"]
    ]
    head = ("test, length, or benchmark", "before", "after", "difference", "95% interval", "same samples")
    return [Section("Before and after, sample by sample", tables=[Table(head, rows)])]


def _perplexity(sides: Sequence[Side], draw: Drawer) -> list[Section]:
    drawn: list[Drawn | None] = []
    rows = []
    for by, name in (("row", "position in the row"), ("document", "distance from the document's start")):
        found = [(side, side.by_metric(f"perplexity_by_{by}")) for side in sides]
        curves = {
            side.name or model_label(side.model): position_bins(result) for side, result in found if result is not None
        }
        if curves:
            alt = f"Perplexity by {name}; bands are 95% bootstrap intervals over rows."
            drawn.append(draw(alt, partial(figures.perplexity_curve, curves, by=by)))
        rows += [
            [
                f"{side.lead}{by}, {part.start:,} to {part.end:,}",
                f"{part.value:.2f}",
                interval_text(part, "{:.2f}"),
                f"{part.n:,}",
            ]
            for side, result in found
            if result is not None
            for part in result.by_position
        ]
    if not rows:
        return []
    head = ("counted from the start of, positions", "perplexity", "95% interval", "tokens")
    return [Section("Perplexity", drawn, [Table(head, rows, "Values", folded=True)])]


def _longppl(sides: Sequence[Side]) -> list[Section]:
    rows = []
    for side in sides:
        found = side.by_metric("longppl")
        if found is None:
            continue
        chosen = f"key tokens by {model_label(found.details['evaluator'])}"
        rows.append([f"{side.lead}{chosen}", f"{found.value:.3f}", interval_text(found, "{:.3f}"), f"{found.n:,}"])
        rows.append(
            [f"{side.lead}all tokens", f"{found.details['perplexity']:.3f}", "", f"{found.details['tokens']:,}"]
        )
        rows += [
            [
                f"{side.lead}positions {part.start:,} to {part.end:,}",
                f"{part.value:.3f}",
                interval_text(part, "{:.3f}"),
                f"{part.n:,}",
            ]
            for part in found.by_position
        ]
    head = ("part of the texts", "perplexity", "95% interval", "tokens")
    title = "LongPPL: perplexity of the tokens that need the long context"
    return [Section(title, tables=[Table(head, rows)])] if rows else []


def _loss(sides: Sequence[Side]) -> list[Section]:
    rows = []
    for side in sides:
        found = side.by_metric("loss")
        if found is None:
            continue
        rows.append([f"{side.lead}all", f"{found.value:.4f}", interval_text(found, "{:.4f}"), f"{found.n:,}"])
        rows += [
            [f"{side.lead}positions {part.start:,} to {part.end:,}", f"{part.value:.4f}", "", f"{part.n:,}"]
            for part in found.by_position
        ]
    head = ("part of the rows", "loss (nats per target)", "95% interval", "targets")
    return [Section("Loss on packed rows, as training takes it", tables=[Table(head, rows)])] if rows else []


def _benchmarks(sides: Sequence[Side]) -> list[Section]:
    rows = [
        [f"{side.lead}{found.task}", found.metric, f"{found.value:.2f}", interval_text(found), str(found.n)]
        for side in sides
        for found in side.benchmarks
    ]
    head = ("benchmark", "metric", "score", "95% interval", "samples")
    return [Section("Short benchmarks, by lm-eval", tables=[Table(head, rows)])] if rows else []
