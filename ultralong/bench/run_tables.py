"""Tables of what runs on GPUs beside training and attention: a served prompt, and what saves cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultralong.bench.results import rows_of
from ultralong.bench.training.saves_summary import written_in


def serve_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """One long prompt through the server, asked by OpenAI's client.

    Args:
        recorded: What `ultralong bench serve --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """
    rows = sorted((row for file in recorded for row in rows_of(file)), key=lambda row: (row["tokens"], row["gpus"]))
    lines = [
        "| model | prompt | GPUs | cache | seconds to the first token | TF/s per GPU | of the kernel's |"
        " tokens/s after | first token again |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['tokens']:,}", str(row["gpus"]), row["kv"]]
        # A prompt that was read faster than its kernel alone says that the kernel's time was not its own.
        of_kernel = "not known" if row["of_kernel"] > 1 else f"{row['of_kernel']:.0%}"
        cells += [f"{row['seconds_to_first_token']:.1f}", f"{row['tflops']:.0f}", of_kernel]
        cells += [f"{row['tokens_per_second_after']:.1f}", f"{row['again_seconds_to_first_token']:.2f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if rows else []


def saves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What a checkpoint that is written in the background takes from a step.

    Args:
        recorded: What `ultralong bench saves --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """
    rows = [row for file in recorded for row in rows_of(file) if "cost_seconds" in row]
    lines = [
        "| model | GPUs | tokens | seconds a step | checkpoint, GiB | copied in | written in | takes | of a step |"
        " waited for |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["gpus"], row["tokens"])):
        cells = [row["model"], str(row["gpus"]), f"{row['tokens']:,}", f"{row['seconds_per_step']:.2f}"]
        cells += [
            f"{row['checkpoint_gib']:.1f}" if "checkpoint_gib" in row else "",
            f"{row['copy_seconds']:.2f} s",
            written_in(row),
            f"{row['cost_seconds']:.2f} s",
        ]
        of_other = f" ({row['cost_of_other_step']:.2%} of {row['other_step']:.0f} s)" if "other_step" in row else ""
        waited = f"{row['waited_seconds']:.1f} s" if "waited_seconds" in row else ""
        lines.append(f"| {' | '.join(cells)} | {row['cost_of_a_step']:.1%}{of_other} | {waited} |")
    return lines if rows else []
