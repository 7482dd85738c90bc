"""Tables of what runs on GPUs beside training and attention: a served prompt, and what saves cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultralong.bench.results import Row, all_rows, markdown
from ultralong.bench.training.saves_summary import written_in


def serve_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """One long prompt through the server, asked by OpenAI's client.

    Args:
        recorded: What `ultralong bench serve --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """

    def cells(row: Row) -> list[str]:
        cells = [row["model"], f"{row['tokens']:,}", row["gpus"], row["kv"]]
        # A prompt that was read faster than its kernel alone says that the kernel's time was not its own.
        of_kernel = "not known" if row["of_kernel"] > 1 else f"{row['of_kernel']:.0%}"
        cells += [f"{row['seconds_to_first_token']:.1f}", f"{row['tflops']:.0f}", of_kernel]
        return [*cells, f"{row['tokens_per_second_after']:.1f}", f"{row['again_seconds_to_first_token']:.2f} s"]

    head = (
        "model | prompt | GPUs | cache | seconds to the first token | TF/s per GPU | of the kernel's | "
        "tokens/s after | first token again"
    )
    return markdown(head, map(cells, sorted(all_rows(recorded), key=lambda row: (row["tokens"], row["gpus"]))))


def saves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What a checkpoint that is written in the background takes from a step.

    Args:
        recorded: What `ultralong bench saves --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """

    def cells(row: Row) -> list[str]:
        what = [row["model"], row["gpus"], f"{row['tokens']:,}", f"{row['seconds_per_step']:.2f}"]
        size = f"{row['checkpoint_gib']:.1f}" if "checkpoint_gib" in row else ""
        took = [f"{row['copy_seconds']:.2f} s", written_in(row), f"{row['cost_seconds']:.2f} s"]
        of_other = f" ({row['cost_of_other_step']:.2%} of {row['other_step']:.0f} s)" if "other_step" in row else ""
        waited = f"{row['waited_seconds']:.1f} s" if "waited_seconds" in row else ""
        return [*what, size, *took, f"{row['cost_of_a_step']:.1%}{of_other}", waited]

    rows = [row for row in all_rows(recorded) if "cost_seconds" in row]
    rows.sort(key=lambda row: (row["model"], row["gpus"], row["tokens"]))
    head = (
        "model | GPUs | tokens | seconds a step | checkpoint, GiB | copied in | written in | takes | of a step | "
        "waited for"
    )
    return markdown(head, map(cells, rows))
