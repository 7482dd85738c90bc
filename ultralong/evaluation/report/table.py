"""What a run measured as lines of text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ultralong.evaluation.measures.result import Part, Result, interval_text
from ultralong.utils.units import many

MOST_CELLS = 12  # lengths and depths of a needle map that is printed whole
POSITIONS = {
    "perplexity_by_row": "perplexity of {} by position in the row",
    "perplexity_by_document": "perplexity of {} by distance from the document's start",
    "loss": "loss of {} by position in the row, nats per target",
}


def table_lines(summary: Mapping[str, Any]) -> list[str]:
    """The numbers of a run.

    Args:
        summary: As `results.summarise` gives it.
    """
    model = summary["settings"]["model"]
    lines: list[str] = []
    rows: Sequence[Part] | None = None
    for result in (Result.from_dict(values) for values in summary["results"]):
        if result.metric == "perplexity_by_row":
            rows = result.by_position
        elif result.metric == "perplexity_by_document" and result.by_position == rows:
            lines.append("  by distance from the document's start it is the same: each row is one document")
            continue
        if result.task == "needle":
            lines += needle_lines(result, model)
        elif result.metric == "longppl":
            lines += longppl_lines(result, model)
        elif result.metric in POSITIONS:
            lines += position_lines(result, model)
        elif not result.by_length:
            lines.append(f"{result.task:20} {result.value:16.1f}  [{interval_text(result)}]  n {result.n}")
    for item in summary["families"]:
        mean = Part(item["score"], item["n"], item["low"], item["high"])
        lines.append(
            f"{item['family']:20} {item['length']:>9,}  {item['score']:6.1f}  [{interval_text(mean)}]  "
            f"{item['tasks']} {'test' if item['tasks'] == 1 else 'tests'}, n {item['n']}"
        )
    lines += capability_lines(summary["capabilities"], summary["areas"])
    if summary["effective"] is not None:
        reached, bar, tests = (summary["effective"][name] for name in ("length", "bar", "tasks"))
        lines.append(
            f"effective length (longest with a mean of {bar} or more up to it, {tests} of RULER's 13 tests): "
            f"{f'{reached:,}' if reached else 'none'}"
        )
    return lines


def capability_lines(means: Sequence[Mapping[str, Any]], areas: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a capability: its score at every length, and the area under its curve with the interval.

    Args:
        means: As `capability.capability_means` gives them.
        areas: As `capability.curve_areas` gives them.
    """
    if not means:
        return []
    lengths = sorted({item["length"] for item in means})
    found = {(item["capability"], item["length"]): item for item in means}
    under = {item["capability"]: item for item in areas}
    lines = ["by capability" + " " * 7 + "".join(f"{length:>11,}" for length in lengths) + "  area under the curve"]
    for name in dict.fromkeys(item["capability"] for item in means):
        cells = "".join(
            f"{found[name, length]['score']:11.1f}" if (name, length) in found else " " * 11 for length in lengths
        )
        lines.append(f"{name:20}{cells}  {area_text(under.get(name))}")
    return lines


def area_text(area: Mapping[str, Any] | None) -> str:
    """An area with its interval and lengths, or why there is none."""
    if area is None:
        return "needs two lengths"
    interval = interval_text(Part(area["score"], area["tasks"], area["low"], area["high"]))
    return f"{area['score']:.1f}  [{interval}]  {area['first']:,} to {area['last']:,}"


def longppl_lines(result: Result, model: str) -> list[str]:
    """LongPPL beside the perplexity of the same texts, and by the key tokens' position in their text."""
    said, rule = result.details, result.details["rule"]
    share = result.n / said["tokens"]
    documents = f"{said['documents']:,} text{'' if said['documents'] == 1 else 's'}"
    return [
        f"LongPPL {result.value:.3f}  ({interval_text(result, '{:.3f}')})  {model}",
        f"  over {result.n:,} key tokens of {documents}, {share:.2%} of {said['tokens']:,} tokens; perplexity over all "
        f"of them {said['perplexity']:.3f}",
        f"  key tokens chosen by {said['evaluator']}: log-likelihood up by more than {rule['alpha']:g} to above "
        f"{rule['beta']:g} with the whole text instead of {rule['short_context']:,} tokens",
        *(
            f"{part.start or 0:>11,} to {part.end or 0:>11,}  {part.value:>9.3f}  ({interval_text(part, '{:.3f}')})  "
            f"n {part.n:,}"
            for part in result.by_position
        ),
    ]


def needle_lines(result: Result, model: str) -> list[str]:
    """A needle map as found of asked by length and depth; a large one by length alone."""
    cells = {(part.length or 0, part.depth or 0.0): part for part in result.by_depth}
    lengths, depths = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    note = [f"  {text}"] if (text := contained_text(result)) else []
    if len(depths) > MOST_CELLS or len(lengths) > MOST_CELLS:
        return [
            f"needles found by {model}, by length, per cent (95% interval)",
            *(f"{part.length or 0:>11,}  {part.value:6.1f}  ({interval_text(part)})" for part in result.by_length),
            *note,
        ]
    rows = [
        f"{length:>11,}" + "".join(f"{_found(cells.get((int(length), depth))):>9}" for depth in depths)
        for length in lengths
    ]
    head = "     tokens" + "".join(f"{depth:>9.0%}" for depth in depths)
    return [f"needles found by {model}, by length and depth", head, *rows, *note]


def contained_text(result: Result) -> str:
    """On a needle map's answers that hold the number and are not counted as found; empty where there are none."""
    more = result.details.get("contained", 0) - round(result.value * result.n / 100)
    if more <= 0:
        return ""
    return (
        f"Not counted: {more} of {result.n} answers that hold the number behind something else, such as a colon; "
        "RULER's niah_single_2 counts such answers."
    )


def _found(part: Part | None) -> str:
    return "" if part is None else f"{part.value * part.n / 100:.0f}/{part.n}"


def position_lines(result: Result, model: str) -> list[str]:
    """Perplexity or loss by position, with intervals."""
    form = "{:.4f}" if result.metric == "loss" else "{:.2f}"
    known = result.low is not None or any(part.low is not None for part in result.by_position)
    lines = [POSITIONS[result.metric].format(model) + (" (95% interval)" if known else "")]
    if result.metric == "loss":
        lines.append(
            f"{'all':>26}  {result.value:9.4f}  ({interval_text(result, form)}), {many(result.n, 'target')} of "
            f"{many(result.details['documents'], 'document')}"
        )
    for part in result.by_position:
        ends = "" if result.metric == "loss" else f"  ({interval_text(part, form)})"
        lines.append(f"{part.start or 0:>11,} to {part.end or 0:>11,}  {form.format(part.value):>9}{ends}")
    return lines
