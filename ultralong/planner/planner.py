"""From a config to a plan: the estimates together, the longest row that fits, and what to change where none does."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.planner.autotune import choose_memory
from ultralong.planner.checks import check_numbers
from ultralong.planner.machine import Machine, load_machine
from ultralong.planner.memory import FRAGMENTED, gpu_lines, host_lines
from ultralong.planner.report import GIB, Line, Plan
from ultralong.planner.shapes import planned_model, shape_of
from ultralong.planner.step_time import run_lines, step_lines
from ultralong.planner.workload import Job
from ultralong.rope import declared_window
from ultralong.training.config import MemoryConfig, TrainConfig
from ultralong.training.preflight import check_start
from ultralong.utils.settings import to_mapping

STEP = 1024  # the longest row is given in multiples of this
STATES = ("tensors: parameters", "tensors: AdamW")  # there all the time
SHORT = 65536  # below this a step's memory does not yet grow in a straight line with the row


def plan(
    config: TrainConfig,
    gpus: int | None = None,
    *,
    machine: Machine | str = "h200",
    tokens: int | None = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    price: float | None = None,
    fit: bool = False,
) -> Plan:
    """Estimate a run.

    Args:
        config: The run, as the trainer reads it. Its model may be a folder, a known shape or a hub id; no weights are
            read.
        gpus: GPUs of the run; by default as many as share one row, or the parameters where those are more.
        machine: The GPU, by name or with rates of its own.
        tokens: Tokens of a row; by default those of the packed rows, or where there are none yet the config's `length`,
            or the model's window.
        gpu_memory: GiB of one GPU; by default the machine's.
        host_memory: GiB of host memory for one process; unknown by default, and then not judged.
        price: Of one GPU-hour, in any currency.
        fit: Choose what is kept, moved to the host and computed again (`ultralong.planner.autotune`) instead of
        taking it
            from the config; the plan says what was chosen.

    Returns:
        The plan. It takes some seconds, and no GPU.

    Raises:
        ValueError: The model cannot be found, the number of GPUs does not fit the config, or a number has no sense.
    """
    check_numbers(gpus=gpus, tokens=tokens, gpu_memory=gpu_memory, host_memory=host_memory, price=price)
    machine = load_machine(machine) if isinstance(machine, str) else machine
    gpus = _fewest_gpus(config) if gpus is None else gpus
    model, named = planned_model(config.model, config.base_model)
    check_start(config, gpus, resume=True, planned=True, shape=model)
    known = tokens or _row_length(config) or config.length
    tokens = known or declared_window(model.get_text_config())
    job = Job(config, model, shape_of(model), machine, tokens, gpus)
    budget = machine.memory if gpu_memory is None else gpu_memory * GIB
    host = None if host_memory is None else host_memory * GIB
    if fit:
        job = _with_memory(job, choose_memory(job, budget, host))
    steps = step_lines(job)
    seconds = sum(line.value for line in steps)
    useful = job.shape.model_flops(tokens) * config.global_batch_size
    lines = (*gpu_lines(job), *host_lines(job), *steps, *run_lines(job, seconds, price))
    growth = _Growth(job)
    return Plan(
        model=Path(named).name,
        parameters=job.shape.parameters,
        tokens=tokens,
        gpus=gpus,
        machine=machine.name,
        gpu_memory=budget,
        host_memory=host,
        lines=lines,
        memory=to_mapping(job.config.memory),
        mfu=useful / seconds / gpus / machine.peak,
        longest=growth.longest(budget),
        advice=(*_gpu_advice(job, budget, growth), *_host_advice(lines, host)),
        assumed=""
        if known
        else f"No packed rows in {config.data[0].rows}: planned for rows of the model's window. "
        "For others pack them first, or pass --tokens N.",
    )


@dataclass(frozen=True)
class _Growth:
    """A GPU's memory over the tokens of a row that it holds; what a step does is taken to grow in straight lines."""

    job: Job

    @cached_property
    def _ends(self) -> tuple[Job, Job]:
        high = max(self.job.share, SHORT)
        return _with_share(self.job, high // 2), _with_share(self.job, high)

    def longest(self, budget: float) -> int:
        """The longest row that fits, over the GPUs that share it."""
        low, high = self._ends
        share = _longest(low, high, budget)
        if share > high.share:  # the line bends where another moment becomes the worst one: once more, from nearer
            share = _longest(high, _with_share(self.job, share), budget)
        return share * self.job.sequence

    def sequence(self, budget: float) -> int | None:
        """The power of two of GPUs that have to share the row for it to fit, or None where none is enough."""
        counts = (2**i for i in range(self.job.tokens.bit_length()))
        return next((count for count in counts if _between(*self._ends, -(-self.job.tokens // count)) <= budget), None)


def _longest(low: Job, high: Job, budget: float) -> int:
    """Tokens of one GPU that fit, by what two jobs do."""

    def total(steps: int) -> float:
        return _between(low, high, steps * STEP)

    most = next(steps for steps in (2**i for i in itertools.count()) if total(steps) > budget)
    return max(0, bisect_right(range(most), budget, key=total) - 1) * STEP


def _between(low: Job, high: Job, share: int) -> float:
    """Bytes on a GPU with so many tokens of a row, on the line through two jobs."""
    followed = low.trace.towards(high.trace, (share - low.share) / (high.share - low.share))
    return _total(replace(_with_share(high, share), followed=followed))


def _with_memory(job: Job, memory: MemoryConfig) -> Job:
    return replace(job, config=replace(job.config, memory=memory))


def _with_sequence(job: Job, sequence: int) -> Job:
    parallel = replace(job.config.parallel, context_parallel_size=sequence)
    return replace(job, config=replace(job.config, parallel=parallel), gpus=max(job.gpus, sequence))


def _with_share(job: Job, share: int) -> Job:
    return replace(job, tokens=share * job.sequence)


def _total(job: Job) -> float:
    return sum(line.value for line in gpu_lines(job) if line.counts)


def _fewest_gpus(config: TrainConfig) -> int:
    return math.lcm(config.parallel.context_parallel_size, config.parallel.fsdp_shard_degree or 1)


def _row_length(config: TrainConfig) -> int | None:
    """Tokens of the packed rows, or of those that the config says will be packed."""
    folder = Path(config.data[0].rows)
    return PackedRows(folder).length if (folder / "manifest.json").is_file() else config.length


def _gpu_advice(job: Job, budget: float, growth: _Growth) -> list[str]:
    """Each change that would make it fit by itself, with what the total would then be; nothing when it fits."""
    total = _total(job)
    if total <= budget:
        return []
    advice = [f"Each GPU is short by {(total - budget) / GIB:.1f} GiB."]
    states = sum(line.value for line in gpu_lines(job) if line.name.startswith(STATES))
    if states * (1 + FRAGMENTED) > budget and job.shard is None:
        over = math.ceil(2 * states / budget)
        return [
            *advice,
            f"Parameters and optimizer states alone take {states / GIB:.1f} GiB, as every GPU holds all "
            f"of them: share them out over {over} GPUs or more (parallel.fsdp_shard_degree={over}), take a smaller "
            "model, or GPUs with more memory.",
        ]
    if states * (1 + FRAGMENTED) > budget:
        return [
            *advice,
            f"Parameters and optimizer states alone take {states / GIB:.1f} GiB over parallel.fsdp_shard_degree="
            f"{job.shard} GPUs: share them out over more.",
        ]
    saving, changes = job, []
    for name, value in (("activation_checkpointing", True), ("layer_tile", 32768), ("layer_inputs_offloaded", -1)):
        if name == "layer_tile" and (job.shard is None or job.share < 2 * value):
            continue  # a short row's feed-forward layer is not what is too large
        if getattr(saving.config.memory, name) in (False, 0) and _total(saving) > budget:
            saving = _with_memory(saving, replace(saving.config.memory, **{name: value}))
            changes.append(f"memory.{name}={str(value).lower()}")
            advice.append(_verdict(" and ".join(changes), _total(saving), budget))
    change = " and ".join(changes)
    # With several GPUs all gradients exist all the time.
    together = replace(saving, gpus=max(2 * saving.sequence, saving.gpus))
    sequence = _Growth(together).sequence(budget)
    if sequence is not None and sequence > job.sequence:
        # More GPUs than kv heads repeat them, more than heads gather them, and the line is not quite straight.
        tried = [_with_sequence(saving, times * sequence) for times in (1, 2, 4)]
        wider = next((job for job in tried if _total(job) <= budget), tried[-1])
        change += f"{' and ' if change else ''}parallel.context_parallel_size={wider.sequence} on {wider.gpus} GPUs"
        advice.append(_verdict(change, _total(wider), budget))
    if longest := growth.longest(budget):
        advice.append(f"Rows of {longest:,} tokens or fewer fit as it is.")
    return advice


def _verdict(change: str, total: float, budget: float) -> str:
    return f"{change}: {total / GIB:.1f} GiB, which {'fits' if total <= budget else 'is still too much'}."


def _host_advice(lines: tuple[Line, ...], host: float | None) -> list[str]:
    needed = sum(line.value for line in lines if line.place == "host")
    if host is None or needed <= host:
        return []
    return [
        f"The host's memory is short by {(needed - host) / GIB:.1f} GiB while a checkpoint is saved: take a host "
        f"with {needed / GIB:.0f} GiB for that process, or a smaller model."
    ]
