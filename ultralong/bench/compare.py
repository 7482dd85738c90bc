"""Compare two result files of the same measurement: `ultralong bench compare BEFORE.json AFTER.json`.

Rows of the two files belong together when everything that describes the case is the same: model, tokens, GPUs, scheme,
kernel, memory settings and so on. Where a file measured a case twice, the later row counts. A value that got worse by
more than the tolerance is a regression; so is a case that had numbers and now has only a note, such as out of memory.
Rows of different hardware are not compared, but named. Either may be a folder, as `notebooks/results`: all of its rows.
Rows without numbers of speed or memory, as of a table of faults, take no part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ultralong.bench.results import Facts, Row
from ultralong.training.config import MemoryConfig

# What describes a case, in the order of its printed name.
CASE = (
    *("rate", "task", "peer", "name", "model", "layers", "lora", "kernel", "kind", "dtype", "head_size", "size"),
    *("bytes", "tokens", "length", "packed", "documents", "mix", "sharing", "degree", "gpus", "ranks", "sharded"),
    *("state_precision", "head_chunks", "memory", "kv", "chunk", "batch", "new_tokens", "prompt", "exchange"),
    *("begun", "checkpoint_layers", "trained", "gpu_memory_gib", "host_memory_gib", "capped_gpu_gib"),
    *("fp8", "heads", "queries", "keys", "block", "warps", "programs", "kept", "notebook", "requests"),
)
HIGHER_IS_BETTER = frozenset(
    ("tflops", "forward_tflops", "backward_tflops", "fp8_tflops", "flash4_tflops", "gbps", "gbs")
    + ("tokens_per_second", "tokens_per_second_per_gpu", "tokens_per_second_after", "again_tokens_per_second_after")
)
LOWER_IS_BETTER = frozenset(
    ("ms", "forward_ms", "backward_ms", "seconds", "seconds_per_step", "decode_seconds_per_token")
    + ("seconds_per_parameter", "prefill_seconds", "cpu_seconds", "seconds_to_first_token", "import_seconds")
    + ("again_seconds_to_first_token", "copy_seconds", "cost_seconds")
    + ("peak_gib", "cache_gib", "peak_gpu_gib", "peak_host_gib", "pinned_host_gib")
)
SHOWN = 10  # cases that were not measured again: of a folder of results they are most
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

    @property
    def ratio(self) -> float | None:
        """The value after over that before."""
        return None if self.after is None else self.after / self.before

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
        new: Cases of the second file only, and those that had no number in the first, such as out of memory.
        tolerance: The share from which on a worse value counts as a regression.
        elsewhere: Cases of both that were measured on different hardware, with the two names.
        measured: Who measured the compared cases, before and after; where several did, all of them.
    """

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    tolerance: float
    elsewhere: tuple[tuple[str, str, str], ...] = ()
    measured: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The values that got worse by more than the tolerance."""
        return tuple(change for change in self.changes if change.worse > self.tolerance)

    def __str__(self) -> str:
        """The report: who measured, regressions, improvements beyond the tolerance, cases that only one file has."""
        better = [change for change in reversed(self.changes) if change.worse < -self.tolerance]
        same = len(self.changes) - len(self.regressions) - len(better)
        lines = [
            f"{side}  {who}" for side, whos in zip(("before", "after "), self.measured, strict=True) for who in whos
        ]
        lines += [f"worse   {change}" for change in self.regressions]
        lines += [f"better  {change}" for change in better]
        lines += [f"not measured again  {case}" for case in self.missing[:SHOWN]]
        if more := len(self.missing[SHOWN:]):
            lines.append(f"not measured again  {more} more; --json names them")
        lines += [f"new  {case}" for case in self.new]
        lines += [
            f"other hardware ({before}, then {after}), not compared  {case}" for case, before, after in self.elsewhere
        ]
        lines.append(
            f"{len(self.changes)} values compared: {len(self.regressions)} worse and {len(better)} better by more than "
            f"{self.tolerance:.0%}, {same} within it"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values; `worse` is null where a case has no number any more."""
        values = [
            {**asdict(change), "ratio": change.ratio, "worse": change.worse if math.isfinite(change.worse) else None}
            for change in self.changes
        ]
        named = ("case", "before", "after")
        return {
            "tolerance": self.tolerance,
            "before": list(self.measured[0]),
            "after": list(self.measured[1]),
            "regressions": len(self.regressions),
            "values": values,
            "not_measured_again": list(self.missing),
            "new": list(self.new),
            "other_hardware": [dict(zip(named, each, strict=True)) for each in self.elsewhere],
        }


def compare(before: Iterable[Row], after: Iterable[Row], tolerance: float) -> Comparison:
    """Compare the rows of two measurements of the same hardware.

    Args:
        before: Rows of the first file (`ultralong.bench.results.read_rows`).
        after: Rows of the second.
        tolerance: Share of a value by which it may get worse.

    Returns:
        Every value that both have, and the cases that only one has.

    Raises:
        ValueError: They have no case in common, or the tolerance is negative.
    """
    unknown = Facts()
    return compare_measured([(row, unknown) for row in before], [(row, unknown) for row in after], tolerance)


def compare_measured(
    before: Iterable[tuple[Row, Facts]], after: Iterable[tuple[Row, Facts]], tolerance: float
) -> Comparison:
    """`compare`, of rows with who measured them (`ultralong.bench.results.read_measured`).

    Raises:
        ValueError: As `compare`, or the cases in common were measured on different hardware.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be 0 or more, found {tolerance}")
    first, second = ({case_name(row): (row, facts) for row, facts in rows} for rows in (before, after))
    first = {case: measured for case, measured in first.items() if case and _values(measured[0])}
    second = {case: measured for case, measured in second.items() if case in first or (case and _values(measured[0]))}
    common = [case for case in first if case in second]
    if not common:
        raise ValueError(
            "the files have no case with numbers in common: they must hold the same measurement of the same model, "
            "length and GPUs"
        )
    hardware = {case: (first[case][1].hardware, second[case][1].hardware) for case in common}
    alike = [case for case, (one, other) in hardware.items() if one == other or not (one and other)]
    if not alike:
        one, other = hardware[common[0]]
        raise ValueError(f"the cases in common were measured on different hardware, such as {one} and {other}")
    changes = [change for case in alike for change in _changes(case, first[case][0], second[case][0])]
    measured = [tuple(sorted({str(side[case][1]) for case in alike} - {str(Facts())})) for side in (first, second)]
    return Comparison(
        tuple(sorted(changes, key=lambda change: -change.worse)),
        tuple(case for case in first if case not in second),
        tuple(case for case in second if case not in first),
        tolerance,
        tuple((case, *hardware[case]) for case in common if case not in alike),
        (measured[0], measured[1]),
    )


def case_name(row: Mapping[str, Any]) -> str:
    """What a row measured, as text that is the same in two files exactly when the cases are."""
    row = {RENAMED.get(key, key): value for key, value in row.items()}
    if isinstance(row.get("memory"), dict):
        named = {MemoryConfig.RENAMED.get(key, key): value for key, value in row["memory"].items()}
        # Without defaults, so that a setting that is added later does not make a case another one.
        changed = {key: value for key, value in named.items() if value != getattr(MemoryConfig, key, None)}
        row["memory"] = json.dumps(changed, sort_keys=True)
    return ", ".join(f"{key} {row[key]}" for key in CASE if row.get(key) not in (None, ""))


def _values(row: Row) -> dict[str, float]:
    """What of a row is compared: no rounded nothing, of which no share can be said."""
    known = HIGHER_IS_BETTER | LOWER_IS_BETTER
    numbers = {key: value for key, value in row.items() if key in known and isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if value > 0 and not isinstance(value, bool)}


def _changes(case: str, before: Row, after: Row) -> Iterable[Change]:
    for value, old in _values(before).items():
        new = after.get(value)
        if not isinstance(new, int | float):
            yield Change(case, value, old, None, float("inf"))
        else:
            better = value in HIGHER_IS_BETTER
            yield Change(case, value, old, float(new), (old - new if better else new - old) / old)
