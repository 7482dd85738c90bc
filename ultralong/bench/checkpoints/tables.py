"""Tables of what was tried: checkpoints by programs and versions, config classes by result, faults before and now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ultralong.bench.results import all_rows, markdown

MEANING = {
    "equal": "the model class computes the table that is meant, and the window is the one asked for",
    "refused": "one line says why, and nothing is written",
    "unmade": "transformers itself cannot make or write such a source",
    "different": "the model class computes another table",
    "crash": "another error than one line",
}


def readers_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What each program reads of each kind of checkpoint; in brackets what `ultralong check` says without a run.

    Args:
        recorded: What `ultralong bench readers --json` wrote.

    Returns:
        Lines of a Markdown table.
    """
    rows = all_rows(recorded)
    programs = list(dict.fromkeys((row["program"], row["version"]) for row in rows))
    cells = {(row["kind"], row["program"], row["version"]): _cell(row) for row in rows}
    kinds = dict.fromkeys(row["kind"] for row in rows)
    lines = ([kind, *(cells.get((kind, *one), "") for one in programs)] for kind in kinds)
    return markdown(" | ".join(["checkpoint", *(" ".join(one) for one in programs)]), lines)


def lines_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What `ultralong check` says to type for each program, and the window that it offers by itself.

    Args:
        recorded: What `ultralong bench readers --json` wrote.

    Returns:
        Lines of a Markdown table: a program's line for most checkpoints first, then those of the others, by name.
        Checkpoints that a program refuses are left out.
    """
    rows = [row for row in all_rows(recorded) if row["window"] is not None]
    lines = []
    for program in dict.fromkeys((row["program"], row["version"]) for row in rows):
        kinds: dict[tuple[str, int], list[str]] = {}
        for row in rows:
            if (row["program"], row["version"]) == program:
                kinds.setdefault((row["typed"], row["window"]), []).append(row["kind"])
        ordered = sorted(kinds.items(), key=lambda each: -len(each[1]))
        for number, ((typed, window), names) in enumerate(ordered):
            named = "; ".join(names) if number else f"the other {len(names)}"
            lines.append([" ".join(program), f"`{typed}`", f"{window:,}", named])
    return markdown("program | to type | its window | checkpoints", lines)


def _cell(row: Mapping[str, Any]) -> str:
    if row["read"] is None:
        return f"({row['check']})"
    if row["read"] == "right":
        return "right" if row["check"] == "right" else "right, check says otherwise"
    return f"{row['read']}, {'said' if row['check'] in ('wrong', 'refused') else 'not said'}"


def configs_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """How many cases of how many architectures had which result.

    Args:
        recorded: What `ultralong bench configs --json` wrote.

    Returns:
        Lines of a Markdown table.
    """
    rows = all_rows(recorded)
    cases: Counter[str] = Counter()
    for row in rows:
        cases.update(row["counts"])
    lines = []
    for result, meaning in MEANING.items():
        types = sum(result in row["counts"] for row in rows)
        lines.append([result, f"{cases[result]:,}", f"{types} of {len(rows)}", meaning])
    return markdown("result | cases | architectures with one | meaning", lines)


def faults_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Faults and hostile inputs: what a version did before, and what this one does.

    Args:
        recorded: What `python -m tests.support.fault_trials --json` wrote.

    Returns:
        Lines of a Markdown table.
    """
    lines = []
    for row in all_rows(recorded):
        seen = [row.get(f"{when}_seen", "not run") for when in ("before", "after")]
        cells = [text.replace("|", "/").replace("<", "&lt;") for text in seen]
        marks = [f"**{row[when]}**: " if row.get(when) == "fault" else "" for when in ("before", "after")]
        before, after = (mark + cell for mark, cell in zip(marks, cells, strict=True))
        lines.append([row["input"].replace("<", "&lt;"), f"`{row['command']}`", before, after])
    return markdown("input | command | 0.3.0 | now", lines)
