"""Compare two result files of the same measurement: `ultralong bench compare BEFORE.json AFTER.json`.

Rows of the two files belong together when everything that describes the case is the same: model, tokens, GPUs, scheme,
kernel, memory settings and so on. Where a file measured a case twice, the later row counts. A value that got worse by
more than the tolerance is a regression; so is a case that had numbers and now has only a note, such as out of memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ultralong.bench.results import Row
from ultralong.training.config import MemoryConfig

# What describes a case, in the order of its printed name.
CASE = (
    *("rate", "task", "peer", "name", "model", "layers", "kernel", "dtype", "head_size", "size", "bytes"),
    *(
        "tokens",
        "length",
        "packed",
        "documents",
        "mix",
        "sharing",
        "degree",
        "gpus",
        "ranks",
        "sharded",
        "state_precision",
        "head_chunks",
        "memory",
        "kv",
        "chunk",
        "batch",
        "new_tokens",
    ),
    *("begun", "checkpoint_layers"),
)
HIGHER_IS_BETTER = frozenset(
    ("tflops", "forward_tflops", "backward_tflops", "gbps", "tokens_per_second", "tokens_per_second_per_gpu")
)
LOWER_IS_BETTER = frozenset(
    ("forward_ms", "backward_ms", "seconds", "seconds_per_step", "decode_seconds_per_token", "seconds_per_parameter")
    + ("prefill_seconds", "cpu_seconds", "peak_gib", "cache_gib", "peak_gpu_gib", "peak_host_gib", "pinned_host_gib")
)
RENAMED = {"stages": "head_chunks", "states": "state_precision"}  # columns of rows recorded before 0.4


@dataclass(frozen=True)
class Change:
    """One value of one case, before and after.

    Attributes:
        case: What was measured.
        value: Name of the value.
        before: The value in the first file.
        after: The value in the second; None where the case has no numbers there any more.
        worse: How much worse it got, as a share of the value before: 0.05 is 5% slower or larger, negative is better.
    """

    case: str
    value: str
    before: float
    after: float | None
    worse: float

    def __str__(self) -> str:
        """One line for a terminal."""
        if self.after is None:
            return f"{self.case}: {self.value} {self.before:,.4g} -> no number"
        change = f"{abs(self.worse):.1%} {'worse' if self.worse > 0 else 'better'}" if self.worse else "the same"
        return f"{self.case}: {self.value} {self.before:,.4g} -> {self.after:,.4g} ({change})"


@dataclass(frozen=True)
class Comparison:
    """What two result files have in common, and what they have not.

    Attributes:
        changes: Every value that a case of the first file has, the worst first.
        missing: Cases of the first file only.
        new: Cases of the second file only.
        tolerance: The share from which on a worse value counts as a regression.
    """

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The values that got worse by more than the tolerance."""
        return tuple(change for change in self.changes if change.worse > self.tolerance)

    def __str__(self) -> str:
        """The report: regressions, improvements beyond the tolerance, and cases that only one file has."""
        better = [change for change in reversed(self.changes) if change.worse < -self.tolerance]
        same = len(self.changes) - len(self.regressions) - len(better)
        lines = [f"worse   {change}" for change in self.regressions]
        lines += [f"better  {change}" for change in better]
        lines += [f"not measured again  {case}" for case in self.missing]
        lines += [f"new  {case}" for case in self.new]
        lines.append(
            f"{len(self.changes)} values compared: {len(self.regressions)} worse and {len(better)} better by more than "
            f"{self.tolerance:.0%}, {same} within it"
        )
        return "\n".join(lines)


def compare(before: Iterable[Row], after: Iterable[Row], tolerance: float) -> Comparison:
    """Compare the rows of two measurements.

    Args:
        before: Rows of the first file (`ultralong.bench.results.read_rows`).
        after: Rows of the second.
        tolerance: Share of a value by which it may get worse.

    Returns:
        Every value that both have, and the cases that only one has.

    Raises:
        ValueError: They have no case in common, or the tolerance is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be 0 or more, found {tolerance}")
    first, second = _by_case(before), _by_case(after)
    if not first.keys() & second.keys():
        raise ValueError(
            "the files have no case in common: they must hold the same measurement of the same model, length and GPUs"
        )
    changes = [change for case, row in first.items() if case in second for change in _changes(case, row, second[case])]
    return Comparison(
        tuple(sorted(changes, key=lambda change: -change.worse)),
        tuple(case for case in first if case not in second),
        tuple(case for case in second if case not in first),
        tolerance,
    )


def _by_case(rows: Iterable[Row]) -> dict[str, Row]:
    return {case_name(row): row for row in rows}


def case_name(row: Mapping[str, Any]) -> str:
    """What a row measured, as text that is the same in two files exactly when the cases are."""
    row = {RENAMED.get(key, key): value for key, value in row.items()}
    if isinstance(row.get("memory"), dict):
        named = {MemoryConfig.RENAMED.get(key, key): value for key, value in row["memory"].items()}
        # Without defaults, so that a setting that is added later does not make a case another one.
        changed = {key: value for key, value in named.items() if value != getattr(MemoryConfig, key, None)}
        row["memory"] = json.dumps(changed, sort_keys=True)
    return ", ".join(f"{key} {row[key]}" for key in CASE if row.get(key) not in (None, ""))


def _changes(case: str, before: Row, after: Row) -> Iterable[Change]:
    for value, old in before.items():
        higher = value in HIGHER_IS_BETTER
        if not higher and value not in LOWER_IS_BETTER:
            continue
        if isinstance(old, bool) or not isinstance(old, int | float) or old <= 0:
            continue  # not measured here, or a rounded nothing: no share of it can be said
        new = after.get(value)
        if not isinstance(new, int | float):
            yield Change(case, value, float(old), None, float("inf"))
        else:
            yield Change(case, value, float(old), float(new), (old - new if higher else new - old) / old)
