"""Tables of training steps and of models: families under every scheme, and scores by capability and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultralong import __version__
from ultralong.bench.results import KERNELS, Row, all_rows, markdown

SCHEMES = {"ring": "ring", "ulysses": "Ulysses", "gathered": "gathered keys"}


def training_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Training steps as measured, with the plan's value in brackets; peers below ours.

    Args:
        recorded: What `ultralong bench train --json` wrote, one or more files.

    Returns:
        Lines of a Markdown table; models, GPUs and lengths rise.
    """

    def cells(row: Row) -> list[str]:
        what = [row["model"], row["gpus"], f"{row['tokens']:,}", _trainer(row)]
        if "seconds_per_step" not in row:
            return [*what, _stopped(row)]
        rates = [f"{row['tokens_per_second_per_gpu']:,.0f}", f"{100 * row['mfu_causal']:.1f}%"]
        host = f"{row['peak_host_gib']:.0f}" if "peak_host_gib" in row else ""
        return [*what, beside_plan(row, "seconds_per_step"), *rates, beside_plan(row, "peak_gpu_gib"), host]

    rows = all_rows(recorded)
    rows.sort(key=lambda row: (row["model"], row["gpus"], row["tokens"], "peer" in row, _trainer(row)))
    head = "model | GPUs | tokens | trainer | seconds a step | tokens/s per GPU | MFU | GiB, GPU | GiB, host"
    return markdown(head, map(cells, rows))


def _stopped(row: Row) -> str:
    """Why a row has no times, in a cell."""
    return "out of memory" if "out of memory" in row["note"] else "stopped"


def _trainer(row: dict[str, Any]) -> str:
    """Whose trainer; ours with its minor version where that is not today's (rows older than 0.2 don't name theirs)."""
    if "peer" in row:
        return str(row["peer"])
    made, today = (version.rpartition(".")[0] for version in (row["versions"].get("ultralong", "0.1.0"), __version__))
    made += f" at {row['versions']['ultralong-commit']}" if "ultralong-commit" in row["versions"] else ""
    mix = f", {row['sharing']} degree of {row['degree']} over {row['mix']}" if "mix" in row else ""
    mix += f", {row['documents']} masked documents" if "documents" in row else ""
    mix += f", LoRA of {row['lora'].partition(',')[0]}" if "lora" in row else ""
    mix += f", held to {row['capped_gpu_gib']:g} GiB" if "capped_gpu_gib" in row else ""
    return ("ours" if made == today else f"ours, {made}") + mix


def beside_plan(row: dict[str, Any], key: str, digits: int = 1) -> str:
    """A measured value, and the plan's in brackets where there is one."""
    planned = row.get(f"planned_{key}")
    return f"{row[key]:.{digits}f}" + ("" if planned is None else f" ({planned:.{digits}f})")


def packed_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Training steps of packed and whole rows by kernel, beside their plans, and what the profiled step spent where.

    Args:
        recorded: What `ultralong bench train --profile --json` wrote, one or more files; none is an empty table.

    Returns:
        Lines of a Markdown table.
    """

    def cells(row: Row) -> list[str]:
        cells = [row["model"], f"{row['tokens']:,}"]
        cells += [f"{row['documents']} masked documents" if "documents" in row else "whole"]
        cells += [KERNELS.get(row["kernel"], row["kernel"])]
        if "seconds_per_step" not in row:
            return [*cells, _stopped(row)]
        kinds = row["kinds"]
        others = sum(kinds.values()) - kinds.get("attention", 0.0) - kinds.get("matrix products", 0.0)
        seconds = [kinds.get("attention", 0.0), kinds.get("matrix products", 0.0), others, row["idle_seconds"]]
        cells += [beside_plan(row, "seconds_per_step", 2)]
        cells += [f"{row['seconds_per_step'] / row['planned_seconds_per_step']:.1%}", f"{row['mfu_causal']:.1%}"]
        return [*cells, *(f"{took:.2f}" for took in seconds)]

    head = (
        "model | tokens | rows | kernel | seconds a step | of the plan | MFU | attention | matrix products | others | "
        "idle"
    )
    return markdown(head, map(cells, all_rows(recorded)))


def capped_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Steps that were held to a smaller card's memory: what they took of it beside the plan; the seconds are the GPU's.

    Args:
        recorded: What `ultralong bench train --capped --json` wrote, one or more files; none is an empty table.

    Returns:
        Lines of a Markdown table.
    """

    def cells(row: Row) -> list[str]:
        trained = f"LoRA, {row['lora'].partition(',')[0]}" if "lora" in row else "all"
        what = [row["model"], trained, f"{row['capped_gpu_gib']:g} GiB", f"{row['tokens']:,}"]
        if "seconds_per_step" not in row:
            return [*what, _stopped(row)]
        taken = f"{_taken(row)[0]:.1f} ({row['planned_total_gpu_gib']:.1f})"
        parts = f"{row['peak_gpu_gib']:.1f} + {row['context_gpu_gib']:.1f}"
        seconds = f"{beside_plan(row, 'seconds_per_step')} on {row['gpu']}"
        return [*what, taken, parts, beside_plan(row, "peak_host_gib"), seconds]

    head = "model | trained | held to | tokens | GiB taken | tensors + driver | GiB, host | seconds a step"
    return markdown(head, map(cells, all_rows(recorded)))


def _taken(row: dict[str, Any]) -> tuple[float, float]:
    """GiB of the GPU that a capped row took in all, and how many that is beyond its cap."""
    took = row["reserved_gpu_gib"] + row["context_gpu_gib"]
    return took, took - row["capped_gpu_gib"]


def measured_line(row: dict[str, Any]) -> str:
    """One row of `ultralong bench train` as text for a terminal."""
    what = (
        f"{row['tokens']:,} tokens"
        + (f" in {row['documents']} documents" if "documents" in row else "")
        + (f" ({row['mix']}), {row['sharing']} degree of {row['degree']}" if "mix" in row else "")
    )
    name = f"{row.get('peer', 'ultralong'):14} {row['model']}, {what}, {row['gpus']} x {row['gpu']}: "
    if "note" in row:
        return name + row["note"] + ("\n" + row["messages"][-1500:] if "messages" in row else "")
    text = (
        f"{row['seconds_per_step']:.1f} s a step, {row['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, MFU "
        f"{row['mfu_causal']:.1%} (causal, nothing recomputed, of 989 TF/s), {row.get('peak_gpu_gib', 0):.1f} GiB"
    )
    if "planned_seconds_per_step" in row:
        text += f"; planned {row['planned_seconds_per_step']:.1f} s, {row['planned_peak_gpu_gib']:.1f} GiB"
    if "capped_gpu_gib" in row:
        took, beyond = _taken(row)
        text += f"; held to {row['capped_gpu_gib']:g} GiB of the GPU, took {took:.1f}: "
        memory = f"{beyond:.2f} more, by what the driver came to hold in the step" if beyond > 0 else "such a card's"
        text += f"the memory is {memory}, the seconds are this GPU's"
    if "of_kernel" in row:
        text += (
            f"; {row['passes']} passes, rows by degree {row['rows_by_degree']}, {row['of_kernel']:.0%} of the rate of "
            "kernels and products alone"
        )
    if "idle_seconds" in row:
        text += f"\n{row['idle_seconds']:10.3f} s  GPU idle, of {row['profiled_seconds']:.3f} s profiled"
    for kind, took in row.get("kinds", {}).items():
        text += f"\n{took:10.3f} s  {kind}"
    for kernel in row.get("kernels", ())[:12]:
        text += f"\n{kernel['seconds']:10.3f} s  {kernel['calls']:7,} x {kernel['name'][:90]}"
    return name + text


def families_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Largest relative error of any gradient by family and scheme, in float64 and in float32 under FSDP2.

    Args:
        recorded: What `tests/support/family_table.py` wrote, one or more files.

    Returns:
        Lines of a Markdown table.
    """
    rows = all_rows(recorded)
    errors = {
        (row["family"], row["scheme"]): f"{row['float64_gradient']:.0e}, {row['float32_fsdp_gradient']:.0e}"
        for row in rows
    }
    families = dict.fromkeys(row["family"] for row in rows)
    cells = ([family, *(errors[family, scheme] for scheme in SCHEMES)] for family in families)
    return markdown(" | ".join(["family", *SCHEMES.values()]), cells)


def refused_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Models that training refuses, with the message.

    Args:
        recorded: As for `families_table`.

    Returns:
        Lines of a Markdown table.
    """
    messages = {name: said for file in recorded for name, said in file["refused"].items()}
    return markdown("model | what is said", list(messages.items()))


def curves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Scores by capability and length with their 95% intervals, and the area under the curve, for each run of a file.

    Args:
        recorded: What `python -m ultralong.evaluation.runs.baseline collect` wrote, one or more files.

    Returns:
        Lines of a Markdown table; a cell without samples is empty.
    """
    runs = {heading: run for file in recorded for heading, run in file["runs"].items()}
    lengths = sorted({cell["length"] for run in runs.values() for cell in run["capabilities"]})
    lines = []
    for heading, run in runs.items():
        areas = {area["capability"]: area for area in run["areas"]}
        for capability in dict.fromkeys(cell["capability"] for cell in run["capabilities"]):
            cells = {cell["length"]: cell for cell in run["capabilities"] if cell["capability"] == capability}
            scores = [_score(cells.get(length)) for length in lengths]
            samples = sum(cell["n"] for cell in cells.values())
            lines.append([heading, capability, samples, *scores, _score(areas.get(capability))])
    head = ["run", "capability", "samples", *(f"{length:,}" for length in lengths), "area under the curve"]
    return markdown(" | ".join(head), lines)


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    between = "" if cell.get("low") is None else f" ({cell['low']:.0f} to {cell['high']:.0f})"
    return f"{cell['score']:.0f}{between}"
