"""Whether so many processes can run a config, and which settings could."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ultralong.training.config import TrainConfig

SHARED_BY, SHARD = "parallel.context_parallel_size", "parallel.fsdp_shard_degree"


def process_problem(config: TrainConfig, world: int) -> str | None:
    """Why `world` processes cannot run this config and which settings could, or None where they can.

    The settings named after one --set are all that it takes. Where rows are shared as the planner says (auto), one way
    that it may choose is enough.
    """
    if config.parallel.undecided:
        ways = [replace(config, parallel=way) for way in config.parallel.choices(max(1, world))]
        problems = [process_problem(way, world) for way in ways]
        return None if None in problems else problems[0]
    if world < 1:
        return f"A run needs 1 process or more, found {world}."
    if (found := _misfit(config, world)) is None:
        return _dynamic_problem(config) if config.parallel.dynamic else None
    key, what, value = found
    size, rows = config.parallel.shared_by, "global_batch_size"
    changes = _fitting(config, world, {key: value})
    advice = f"--set {_words(changes)}"
    if (times := changes.get(rows, 0) / config.global_batch_size) >= 2:  # a preset's steps count on its batch
        advice += f" ({times:g} times the tokens in as many steps: lower steps)"
    larger = (
        _fitting(config, world, {SHARED_BY: shared})
        for shared in range(size + 1, world + 1)
        if key != SHARD and world % shared == 0
    )
    if (other := next((changes for changes in larger if rows not in changes), None)) is not None:
        advice += f", or --set {_words(other)}: more GPUs share a row"
    return f"{what}{advice}."


def _misfit(config: TrainConfig, world: int) -> tuple[str, str, int] | None:
    """The first setting that does not fit so many processes: its key, what is wrong, a value that fits."""
    size, degree = config.parallel.shared_by, config.parallel.fsdp_shard_degree
    rows, micro = config.global_batch_size, config.micro_batch_size
    have = f"this run has {world} process{'es' * (world > 1)}"
    if world % size:
        what = (
            f"{SHARED_BY} is {size}, but {have}. Start a multiple of {size} (on this machine: --processes {size}), or "
        )
        return SHARED_BY, what, max(d for d in range(1, min(size, world) + 1) if world % d == 0)
    if degree is not None and world % degree:
        what = f"{SHARD} is {degree}, but {have}. Start a multiple of {degree}, or "
        return SHARD, what, max(d for d in range(1, min(degree, world) + 1) if world % d == 0)
    if config.lora.base == "nf4" and degree is not None and world != degree:
        what = f"lora.base is nf4, whose codes are sharded over all processes; {SHARD} is {degree}, but {have}. "
        return SHARD, what, world
    each = world // size * micro
    if rows % each and not config.parallel.dynamic:
        what = (
            f"global_batch_size ({rows}) is not a multiple of {world // size} groups of processes x micro_batch_size "
            f"({micro}). "
        )
        return "global_batch_size", what, -(-rows // each) * each
    return None


def _fitting(config: TrainConfig, world: int, changes: dict[str, int]) -> dict[str, int]:
    """Changes of settings, with those that they need beside them."""
    parallel: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in changes.items():
        (parallel if key.startswith("parallel.") else own)[key.removeprefix("parallel.")] = value
    changed = replace(config, parallel=replace(config.parallel, **parallel), **own)
    found = _misfit(changed, world)
    return changes if found is None else _fitting(config, world, {**changes, found[0]: found[2]})


def _words(changes: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())


def _dynamic_problem(config: TrainConfig) -> str | None:
    """Why rows can't be shared by as many processes as each needs, or None where they can."""
    key = "parallel.dynamic_context_parallel"
    if config.micro_batch_size > 1:
        return (
            f"{key} packs as many rows into a pass as parallel.max_tokens_per_rank allows, found micro_batch_size "
            f"{config.micro_batch_size}: set it to 1."
        )
    if config.compile or config.skip_positions_to is not None:
        other = "compile" if config.compile else "skip_positions_to"
        return f"{key} lays rows end to end, which {other} is not for: switch one of them off."
    return None
