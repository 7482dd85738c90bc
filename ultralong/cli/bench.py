"""Commands that time this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def bench_attention(words: Sequence[str]) -> None:
    """Time attention on this machine: every kernel, scheme and peer in one table, beside one GPU."""
    from ultralong.bench.attention.measure import main as run

    run(words)


def bench_prefill(words: Sequence[str]) -> None:
    """Time reading a long prompt on this machine: seconds, memory, and the share of the attention kernel's rate."""
    from ultralong.bench.prefill import main as run

    run(words)


def bench_train(
    model: Positional[str] = "meta-llama/Llama-3.1-8B",
    /,
    *,
    lengths: tuple[int, ...] = (131072,),
    gpus: int = 1,
    layers: int | None = None,
    sharded: bool = False,
    states: Literal["float32", "8bit"] = "float32",
    kernel: str = "auto",
    head_chunks: int | None = None,
    memory: tuple[str, ...] = ("activation_checkpointing=true",),
    fit: bool = False,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    steps: int = 2,
    peers: bool = False,
    profile: bool = False,
    machine: str = "h200",
    folder: Path | None = None,
    json: Path | None = None,
) -> None:
    """Time training steps on this machine, with random weights, beside what the plan says of them.

    Examples:
      ultralong bench train meta-llama/Llama-3.2-1B --lengths 32768 131072 --json rows.json
      ultralong bench train --lengths 1048576 --gpus 2 --sharded --states 8bit --kernel flash4 --head-chunks 8
        --steps 1 --fit --memory layer_tile=32768 loss_tile=8192 --host-memory 108

    Args:
        model: A model folder, a hub id, or a shape that the planner knows; only its shape is taken.
        lengths: Tokens of the rows.
        gpus: Processes, all of which share a row.
        layers: Decoder layers to keep; by default all.
        sharded: Share the parameters out as well (FSDP2).
        states: Type of AdamW's states.
        kernel: Attention kernel.
        head_chunks: Head chunks of the attention scheme: more make its buffers smaller.
        memory: Settings of the memory plan, name=value.
        fit: Let the planner choose what is kept, moved to the host and computed again.
        gpu_memory: With fit: GiB of one GPU; by default the machine's.
        host_memory: With fit: GiB of host memory for one process; without it nothing is moved.
        steps: Measured steps; one on a short row comes before.
        peers: Measure other projects that are installed as well (two GPUs or more).
        profile: Follow one more step and say what its kernels took, by kind and by name.
        machine: Rates that the plan reckons with.
        folder: Keep models and rows here for the next measurement.
        json: Append the rows to this file.
    """
    import tempfile

    from ultralong.bench.results import append_row
    from ultralong.bench.training.measure import TrainingCase, measure
    from ultralong.bench.training.peers import PEERS, measure_peer
    from ultralong.training.config import MemoryConfig
    from ultralong.utils import settings

    plan = settings.from_mapping(
        MemoryConfig, settings.override({"activation_checkpointing": True}, memory, MemoryConfig), "--memory"
    )
    with tempfile.TemporaryDirectory() as made:
        place = folder or Path(made)
        for tokens in lengths:
            case = TrainingCase(
                model,
                tokens,
                layers,
                gpus,
                sharded,
                states,
                kernel,
                head_chunks,
                plan,
                fit,
                gpu_memory,
                host_memory,
                steps,
                profile,
            )
            names = PEERS if peers and gpus > 1 else ()
            for row in (measure(case, machine, place), *(measure_peer(name, case, place) for name in names)):
                if json is not None:
                    append_row(json, row)
                print(_line(row), flush=True)
    if json is not None:
        print(f"{json}: rows appended. The table of the README: python -m ultralong.bench.tables", file=sys.stderr)


def bench_compare(before: Positional[Path], after: Positional[Path], /, *, tolerance: float = 0.03) -> None:
    """Compare two result files of the same measurement; exits with 1 if a value got worse by more than the tolerance.

    Example: ultralong bench compare before.json after.json

    Args:
        before: JSON file of ultralong bench attention, prefill or train, or of the rates that the planner reads.
        after: The same, measured later.
        tolerance: Share by which a value may get worse: 0.03 is 3%.
    """
    from ultralong.bench.compare import compare
    from ultralong.bench.results import read_rows

    found = compare(read_rows(before), read_rows(after), tolerance)
    print(found)
    if found.regressions:
        sys.exit(1)


def _line(row: dict) -> str:
    """One measured row as text."""
    name = f"{row.get('peer', 'ultralong'):14} {row['model']}, {row['tokens']:,} tokens, {row['gpus']} x {row['gpu']}: "
    if "note" in row:
        return name + row["note"] + ("\n" + row["messages"][-1500:] if "messages" in row else "")
    text = (
        f"{row['seconds_per_step']:.1f} s a step, {row['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, MFU "
        f"{row['mfu_causal']:.1%} (causal, nothing recomputed, of 989 TF/s), {row.get('peak_gpu_gib', 0):.1f} GiB"
    )
    if "planned_seconds_per_step" in row:
        text += f"; planned {row['planned_seconds_per_step']:.1f} s, {row['planned_peak_gpu_gib']:.1f} GiB"
    for kind, took in row.get("kinds", {}).items():
        text += f"\n{took:10.3f} s  {kind}"
    for kernel in row.get("kernels", ())[:12]:
        text += f"\n{kernel['seconds']:10.3f} s  {kernel['calls']:7,} x {kernel['name'][:90]}"
    return name + text
