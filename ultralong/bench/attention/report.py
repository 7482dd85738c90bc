"""The table and the result file of a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ultralong.bench.results import write_rows

if TYPE_CHECKING:
    from ultralong.bench.attention.options import AttentionBench, AttentionResult

RULE = "causal, 3.5 x 2 n^2 H D for each document, no recomputation counted"
HEAD = ("length", "rows", "attention", "kernel", "GPUs", "fwd ms", "bwd ms", "TF/s/GPU", "of one", "overhead ms", "GiB")


def table(results: Sequence[AttentionResult]) -> str:
    """The results as a text table, followed by what could not run and by the errors, where checked."""
    lines: list[tuple[str, ...]] = [HEAD]
    for r in results:
        numbers = (r.forward_ms, r.backward_ms, r.tflops, r.of_one, r.overhead_ms, r.peak_gib)
        shown = ["-" if x is None else f"{x:.3g}" if abs(x) < 10 else f"{x:.1f}" for x in numbers]
        lines.append((f"{r.tokens:,}", "packed" if r.packed else "whole", r.name, r.kernel, str(r.ranks), *shown))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    for r in results:
        where = f"{r.name} {r.kernel} at {r.tokens:,}{' packed' if r.packed else ''}"
        if r.note:
            text.append(f"{where}: {r.note}")
        if r.errors:
            errors = ", ".join(f"{key} {value:.2e}" for key, value in r.errors.items())
            text.append(f"{where}: relative error {errors}")
    return "\n".join(text)


def save(path: Path, options: AttentionBench, results: Sequence[AttentionResult]) -> None:
    """Write machine, options and results as a result file."""
    write_rows(path, [asdict(result) for result in results], options=asdict(options), flop_rule=RULE)
