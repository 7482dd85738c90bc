"""Tables of models: families under every attention scheme, and scores by capability and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultralong.bench.results import rows_of

SCHEMES = {"ring": "ring", "ulysses": "Ulysses", "gathered": "gathered keys"}


def families_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Largest relative error of any gradient by family and scheme, in float64 and in float32 under FSDP2.

    Args:
        recorded: What `tests/support/family_table.py` wrote, one or more files.

    Returns:
        Lines of a Markdown table.
    """
    rows = [row for file in recorded for row in rows_of(file)]
    found = {(row["family"], row["scheme"]): row for row in rows}
    lines = [f"| family | {' | '.join(SCHEMES.values())} |", f"|---|{'---|' * len(SCHEMES)}"]
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = (found[family, scheme] for scheme in SCHEMES)
        errors = [f"{row['float64_gradient']:.0e}, {row['float32_fsdp_gradient']:.0e}" for row in cells]
        lines.append(f"| {family} | {' | '.join(errors)} |")
    return lines


def refused_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Models that training refuses, with the message.

    Args:
        recorded: As for `families_table`.

    Returns:
        Lines of a Markdown table.
    """
    messages = {name: said for file in recorded for name, said in file["refused"].items()}
    return ["| model | what is said |", "|---|---|", *(f"| {name} | {said} |" for name, said in messages.items())]


def curves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Scores by capability and length with their 95% intervals, and the area under the curve, for each run of a file.

    Args:
        recorded: What `python -m ultralong.evaluation.runs.baseline collect` wrote, one or more files.

    Returns:
        Lines of a Markdown table; a cell without samples is empty.
    """
    runs = {heading: run for file in recorded for heading, run in file["runs"].items()}
    lengths = sorted({cell["length"] for run in runs.values() for cell in run["capabilities"]})
    lines = [
        f"| run | capability | samples | {' | '.join(f'{n:,}' for n in lengths)} | area under the curve |",
        f"|---|---|---|{'---|' * len(lengths)}---|",
    ]
    for heading, run in runs.items():
        areas = {area["capability"]: area for area in run["areas"]}
        for capability in dict.fromkeys(cell["capability"] for cell in run["capabilities"]):
            cells = {cell["length"]: cell for cell in run["capabilities"] if cell["capability"] == capability}
            scores = " | ".join(_score(cells.get(length)) for length in lengths)
            samples = sum(cell["n"] for cell in cells.values())
            lines.append(f"| {heading} | {capability} | {samples} | {scores} | {_score(areas.get(capability))} |")
    return lines


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    between = "" if cell.get("low") is None else f" ({cell['low']:.0f} to {cell['high']:.0f})"
    return f"{cell['score']:.0f}{between}"
