"""From a config to a plan: the estimates together, the longest row that fits, and what to change where none does."""

from __future__ import annotations

import math

from ultralong.planner.advice import gpu_advice, host_advice
from ultralong.planner.checks import check_numbers
from ultralong.planner.growth import Growth
from ultralong.planner.machine import Machine, load_machine
from ultralong.planner.memory import gpu_memory as gpu_lines
from ultralong.planner.memory import host_memory as host_lines
from ultralong.planner.models.run import NOWHERE
from ultralong.planner.report import Plan
from ultralong.planner.rows import PlannedRows
from ultralong.planner.shapes import check_countable, planned_model, shape_of
from ultralong.planner.sharing.decide import decide_sharing
from ultralong.planner.sharing.priced import Asked, run_workload
from ultralong.planner.step_time import run_totals, step_time
from ultralong.planner.traces import child
from ultralong.planner.workload import Workload
from ultralong.training.config import TrainConfig
from ultralong.training.parallel_config import AUTO
from ultralong.training.preflight import check_start
from ultralong.training.throughput import step_flops
from ultralong.utils.hub import folder_name
from ultralong.utils.settings import to_mapping
from ultralong.utils.units import GIB


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
            read. Where it is none of them, the shape of its `base_model` is taken.
        gpus: GPUs of the run; by default as many as share one row or the parameters, whichever is more.
        machine: The GPU, by name or with rates of its own.
        tokens: Tokens of a row; by default those of the packed rows, or where there are none yet the config's `length`,
            or the model's window. Rows with a document mask are planned by the work of their documents.
        gpu_memory: GiB of one GPU; by default the machine's.
        host_memory: GiB of host memory for one process; unknown by default, and then not judged.
        price: Price of one GPU-hour, in any currency.
        fit: Choose what is stored on the GPU, offloaded and recomputed (`ultralong.planner.autotune`) instead of taking
            it from the config; the plan says what was chosen.

    Returns:
        The plan. It takes some seconds, and no GPU.

    Raises:
        ValueError: The model cannot be found, the trainer would refuse the config or the number of GPUs, or a number
            has no sense.
    """
    check_numbers(gpus=gpus, tokens=tokens, gpu_memory=gpu_memory, host_memory=host_memory, price=price)
    machine = load_machine(machine) if isinstance(machine, str) else machine
    gpus = _fewest_gpus(config) if gpus is None else gpus
    if config.parallel.context_parallel_size != 1:
        child.start()  # imports beside what follows
    decision = None
    if config.parallel.undecided:
        decision = decide_sharing(
            config, gpus, machine=machine, tokens=tokens, gpu_memory=gpu_memory, host_memory=host_memory, fit=fit,
            planned=True,
        )  # fmt: skip
        config = decision.applied(config)
    model, named = planned_model(config.model, config.base_model)
    check_start(config, gpus, resume=True, planned=True, shape=model)
    check_countable(model)
    shape = shape_of(model)
    budget = machine.memory if gpu_memory is None else gpu_memory * GIB
    host = None if host_memory is None else host_memory * GIB
    workload, rows, known = run_workload(Asked(config, gpus, model, shape, machine, budget, host, tokens, fit))
    steps = step_time(workload)
    seconds = sum(line.value for line in steps)
    lines = (*gpu_lines(workload), *host_lines(workload), *steps, *run_totals(workload, seconds, price))
    growth = Growth(workload)
    return Plan(
        model=folder_name(named),
        parameters=workload.shape.parameters,
        tokens=workload.tokens,
        gpus=gpus,
        machine=machine.name,
        gpu_memory=budget,
        host_memory=host,
        lines=lines,
        memory=to_mapping(workload.config.memory),
        mfu=_useful_flops(workload) / seconds / gpus / machine.peak,
        longest=growth.longest(budget),
        advice=(*gpu_advice(workload, budget, growth), *host_advice(lines, host)),
        assumed="" if known else _assumed(config),
        attention=_attention(workload, rows),
        sharing="" if decision is None else decision.reason,
    )


def planned_workload(config: TrainConfig, gpus: int, machine: Machine, tokens: int) -> Workload:
    """A run of rows of so many tokens with everything that its estimates depend on; no rows are looked at.

    Raises:
        ValueError: The model cannot be found or counted.
    """
    model, _ = planned_model(config.model, config.base_model)
    check_countable(model)
    return Workload(config, model, shape_of(model), machine, tokens, gpus)


def _assumed(config: TrainConfig) -> str:
    if config.data[0].rows.startswith(NOWHERE):
        return "Planned for rows of the model's window; --tokens N plans others."
    return (
        f"No packed rows in {config.data[0].rows}: planned for rows of the model's window. "
        "For others pack them first, or pass --tokens N."
    )


def _fewest_gpus(config: TrainConfig) -> int:
    size = config.parallel.context_parallel_size
    return math.lcm(1 if size == AUTO else size, config.parallel.fsdp_shard_degree or 1)


def _useful_flops(workload: Workload) -> float:
    """Causal FLOP of a step by the rule of the log (`ultralong.training.throughput`)."""
    shape, tokens = workload.shape, workload.step_tokens
    pairs = workload.keys_seen * tokens * workload.shape.window_share(workload.tokens, workload.row_boundaries)
    return step_flops(workload.parameters.multiplied, shape.layers, shape.heads * shape.head_dim, tokens, pairs)


def _attention(workload: Workload, rows: PlannedRows | None) -> str:
    """What is said of a row's attention: who shares it, and how far its tokens see."""
    said = []
    if workload.context_parallel_size > 1:
        traced = workload.usual_attention
        said.append(f"Attention scheme: {traced.scheme} over {workload.context_parallel_size} GPUs ({traced.reason}).")
    if rows is not None and rows.packs is not None:
        packs = rows.packs
        said.append(
            f"Rows of a step, {packs.tokens:,.0f} tokens in the mean, are laid end to end in {packs.passes:.1f} packs "
            f"of up to {workload.tokens:,} tokens for each group of GPUs; a query sees {workload.keys_seen:,.0f} keys "
            "in the mean."
        )
    elif rows is not None and rows.documents is not None:
        said.append(
            f"Documents don't see each other: by {len(rows.documents)} of the packed rows a query sees "
            f"{workload.keys_seen:,.0f} keys in the mean, where it would see {workload.tokens / 2:,.0f} of a whole row."
        )
    return " ".join(said)
