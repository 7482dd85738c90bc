"""The one shape in which every measurement is recorded: scores of tests, needles, perplexity, loss, benchmarks.

A result has one number with its count and interval, and the parts that the number hides: by length, by depth, by
position. A run writes a list of them into its folder, and the report reads nothing else for its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ultralong.evaluation.measures.intervals import wilson, wilson_of_mean
from ultralong.utils.files import read_json, write_json

PER_CENT = "per cent"
PARTS = ("by_length", "by_depth", "by_position")
TWO_SIDED_95 = 1.959963984540054  # standard errors to either end of a normal interval


@dataclass(frozen=True)
class Part:
    """The value over some of what was measured.

    Attributes:
        value: In the unit of the result.
        n: What it was counted over.
        low: Lower end of the 95% interval; None where n is too small for one.
        high: Upper end.
        length: Tokens of prompt and answer.
        depth: Where in the prompt the answer stands, 0 first and 1 last.
        start: First position (tokens).
        end: Position behind the last one.
        details: What else was noted, such as wrong answers or seconds.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    length: int | None = None
    depth: float | None = None
    start: int | None = None
    end: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One measurement of one model.

    Attributes:
        task: The test or benchmark.
        metric: What is measured, such as `score`, `found`, `perplexity_by_row`, `loss`, or lm-eval's metric and filter.
        value: The number over everything.
        n: What it was counted over.
        unit: Unit of the value.
        counted: What `n` counts, such as samples, tokens or targets.
        low: Lower end of the 95% interval; None where n is too small for one.
        high: Upper end.
        by_length: Values by tokens of prompt and answer.
        by_depth: Values by length and depth.
        by_position: Values by position.
        details: What else was noted.
    """

    task: str
    metric: str
    value: float
    n: int
    unit: str
    counted: str
    low: float | None = None
    high: float | None = None
    by_length: tuple[Part, ...] = ()
    by_depth: tuple[Part, ...] = ()
    by_position: tuple[Part, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is None or empty is left out."""
        return _filled(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """The reverse of `to_dict`."""
        parts = {name: tuple(Part(**part) for part in values.get(name, ())) for name in PARTS}
        return cls(**{**values, **parts})


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item not in ({}, [])}
    return [_filled(item) for item in value] if isinstance(value, list | tuple) else value


def interval_text(item: Part | Result, form: str = "{:.1f}") -> str:
    """The interval of a value as text: `40.2 to 61.3`, or how few it was counted over where there is none.

    Args:
        item: The value.
        form: Format of an end.
    """
    if item.low is None or item.high is None:
        # The spread over rows is not known from one row, however many tokens it has.
        rows = item.details.get("rows")
        return f"n = {item.n}" if rows is None else f"n = {rows} row{'' if rows == 1 else 's'}"
    return f"{form.format(item.low)} to {form.format(item.high)}"


def write_measurements(path: Path, results: Iterable[Result]) -> None:
    """Write results as a JSON list."""
    write_json(path, [result.to_dict() for result in results])


def read_measurements(path: Path) -> list[Result]:
    """Results of a file of `write_measurements`.

    Raises:
        ValueError: It holds something else.
    """
    found = read_json(path)
    try:
        return [Result.from_dict(values) for values in found]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no list of results: {error}.") from error


def needle_result(cells: Sequence[Mapping[str, Any]]) -> Result:
    """A needle map as a result: found needles in per cent, by length, and by length and depth.

    Args:
        cells: As `needle_grid` gives them; of two cells of one length and depth the later one counts.

    Raises:
        ValueError: There are none.
    """
    kept = {(cell["length"], cell["depth"]): cell for cell in cells}
    if not kept:
        raise ValueError("A needle map needs at least one cell.")
    by_depth = tuple(
        replace(
            _share([kept[key]]),
            length=int(key[0]),
            depth=float(key[1]),
            details={"wrong": kept[key]["wrong"]} if kept[key].get("wrong") else {},
        )
        for key in sorted(kept)
    )
    by_length = tuple(
        replace(_share([cell for key, cell in kept.items() if key[0] == length]), length=int(length))
        for length in sorted({key[0] for key in kept})
    )
    whole = _share(list(kept.values()))
    haystacks = sorted({cell["haystack"] for cell in kept.values() if "haystack" in cell})
    details: dict[str, Any] = {"haystack": haystacks}
    if all("contained" in cell for cell in kept.values()):  # earlier versions did not count it
        details["contained"] = sum(cell["contained"] for cell in kept.values())
    return Result(
        "needle",
        "found",
        whole.value,
        whole.n,
        PER_CENT,
        "needles",
        whole.low,
        whole.high,
        by_length,
        by_depth,
        details=details,
    )


def _share(cells: Sequence[Mapping[str, Any]]) -> Part:
    n, correct = sum(cell["n"] for cell in cells), sum(cell["correct"] for cell in cells)
    low, high = wilson(correct, n)
    return Part(100 * correct / n, n, 100 * low, 100 * high)


def grid_cells(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Parts by length and depth as the cells that `figures.needle_heatmap` draws."""
    return [
        {
            "length": part.length,
            "depth": part.depth,
            "n": part.n,
            "correct": float(f"{part.value * part.n / 100:.3g}"),
        }
        for part in parts
    ]


def perplexity_result(bins: Sequence[Mapping[str, Any]], by: str) -> Result:
    """Perplexity by position as a result.

    Args:
        bins: As `perplexity_by_position` gives them.
        by: What positions are counted from: `row` or `document`.

    Raises:
        ValueError: There are no bins.
    """
    if not bins:
        raise ValueError("Perplexity needs at least one bin that holds tokens.")
    n = sum(item["n"] for item in bins)
    parts = tuple(
        Part(
            item["perplexity"],
            item["n"],
            item["low"],
            item["high"],
            start=item["start"],
            end=item["end"],
            details={key: item[key] for key in ("rows", "each") if key in item},
        )
        for item in bins
    )
    nats = sum(math.log(item["perplexity"]) * item["n"] for item in bins)
    return Result("perplexity", f"perplexity_by_{by}", math.exp(nats / n), n, "", "tokens", by_position=parts)


def position_bins(result: Result) -> list[dict[str, Any]]:
    """Parts by position as the bins that `figures.perplexity_curve` draws."""
    return [
        {"start": part.start, "end": part.end, "perplexity": part.value, "low": part.low, "high": part.high}
        for part in result.by_position
    ]


def benchmark_result(score: Mapping[str, Any]) -> Result:
    """A benchmark of lm-eval as a result; the interval is a normal one from lm-eval's standard error, or Wilson's.

    Samples that are all alike have a standard error of 0, which would claim certainty: Wilson's interval serves there.

    Args:
        score: As `lm_eval.read_score` gives it.
    """
    value, stderr = score["score"], score["stderr"]
    low, high = None, None
    if stderr == 0:
        low, high = (100 * end for end in wilson_of_mean(value / 100, score["n"]))
    elif stderr is not None:
        low, high = max(0.0, value - TWO_SIDED_95 * stderr), min(100.0, value + TWO_SIDED_95 * stderr)
    details = {"stderr": stderr, "lm_eval": list(score["lm_eval"])}
    return Result(score["task"], score["metric"], value, score["n"], PER_CENT, "samples", low, high, details=details)
