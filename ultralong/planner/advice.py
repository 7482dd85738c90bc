"""What to change where a run does not fit, with the figure that would result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ultralong.planner.growth import Growth
from ultralong.planner.memory import FRAGMENTATION, gpu_memory, gpu_total
from ultralong.planner.report import PlanLine
from ultralong.planner.workload import Workload
from ultralong.utils.units import GIB

STATES = ("tensors: parameters", "tensors: frozen", "tensors: AdamW")  # there all the time


def gpu_advice(workload: Workload, budget: float, growth: Growth) -> list[str]:
    """Each change that would make it fit by itself, with what the total would then be; nothing when it fits."""
    total = gpu_total(workload)
    if total <= budget:
        return []
    short = f"Each GPU is short by {(total - budget) / GIB:.1f} GiB."
    states = sum(line.value for line in gpu_memory(workload) if line.name.startswith(STATES))
    if states * (1 + FRAGMENTATION) > budget:
        return [short, _too_many_states(workload, states, budget)]
    saving, changes, advice = workload, list[str](), [short]
    for name, value in (("activation_checkpointing", True), ("layer_tile", 32768), ("layer_inputs_offloaded", -1)):
        if name == "layer_tile" and (workload.shard is None or workload.share < 2 * value):
            continue  # a short row's feed-forward layer is not what is too large
        memory = saving.config.memory
        if getattr(memory, name) in (False, 0) and gpu_total(saving) > budget:
            saving = saving.with_memory(replace(memory, **dict[str, Any]({name: value})))
            changes.append(f"memory.{name}={str(value).lower()}")
            advice.append(_verdict(" and ".join(changes), gpu_total(saving), budget))
    if (wider := _wider(saving, budget, workload.context_parallel_size)) is not None:
        size = wider.context_parallel_size
        changes.append(f"parallel.context_parallel_size={size} on {wider.gpus} GPUs")
        advice.append(_verdict(" and ".join(changes), gpu_total(wider), budget))
    if longest := growth.longest(budget):
        advice.append(f"Rows of {longest:,} tokens or fewer fit as it is.")
    return advice


def _too_many_states(workload: Workload, states: float, budget: float) -> str:
    alone = f"Parameters and optimizer states alone take {states / GIB:.1f} GiB"
    if workload.shard is not None:
        return f"{alone} over parallel.fsdp_shard_degree={workload.shard} GPUs: shard them over more."
    over = math.ceil(2 * states / budget)
    return (
        f"{alone}, as every GPU holds all of them: shard them over {over} GPUs or more "
        f"(parallel.fsdp_shard_degree={over}), take a smaller model, or GPUs with more memory."
    )


def _wider(workload: Workload, budget: float, size: int) -> Workload | None:
    """The run with more than `size` GPUs to a row, as many as are needed; None where no number would be enough."""
    # With several GPUs all gradients exist all the time.
    together = replace(workload, gpus=max(2 * workload.context_parallel_size, workload.gpus), traced=None)
    needed = Growth(together).context_parallel_size(budget)
    if needed is None or needed <= size:
        return None
    # More GPUs than kv heads repeat them, more than heads gather them, and the line is not quite straight.
    tried = None
    for times in (1, 2, 4, 8, 16):
        wider = workload.with_context_parallel_size(times * needed)
        if (total := _total_if_possible(wider)) is None:
            continue
        if total <= budget:
            return wider
        tried = wider
    return tried


def _total_if_possible(workload: Workload) -> float | None:
    """Bytes on each GPU; None where the scheme or the head chunks that were asked for are not for so many GPUs."""
    try:
        return gpu_total(workload)
    except ValueError:
        return None


def _verdict(change: str, total: float, budget: float) -> str:
    return f"{change}: {total / GIB:.1f} GiB, which {'fits' if total <= budget else 'is still too much'}."


def host_advice(lines: Sequence[PlanLine], host: float | None) -> list[str]:
    """What a host's memory is short of, if it is known."""
    needed = sum(line.value for line in lines if line.place == "host")
    if host is None or needed <= host:
        return []
    return [
        f"The host's memory is short by {(needed - host) / GIB:.1f} GiB while a checkpoint is saved: take a host "
        f"with {needed / GIB:.0f} GiB for that process, or a smaller model."
    ]
