"""The run that is planned for a model that nobody has written a config for yet."""

from __future__ import annotations

import os
from pathlib import Path

from ultralong.planner.models.known import KNOWN
from ultralong.planner.shapes import model_config
from ultralong.training.config import DataSource, MemoryConfig, ParallelConfig, TrainConfig, preset
from ultralong.training.memory.activation_memory import check_tiled_layers

TILE = 32768  # tokens: large enough that tiles cost no time
NOWHERE = ".ultralong-plan"  # so that no folder of the user's is taken for its rows, or for an earlier run


def is_model(asked: TrainConfig | str | os.PathLike[str]) -> bool:
    """Whether a model is meant rather than a config: a model folder, a known shape, or a hub id (`owner/name`)."""
    if isinstance(asked, TrainConfig):
        return False
    name = str(asked)
    if (Path(name) / "config.json").is_file() or name.removesuffix("-Instruct") in KNOWN:
        return True
    try:
        preset(asked)
    except ValueError:
        owner, _, rest = name.partition("/")
        return bool(owner and rest) and "/" not in rest and Path(name).suffix not in (".yaml", ".yml", ".json")
    return False


def run_of_model(model: str, gpus: int) -> TrainConfig:
    """One row a step, shared by all GPUs as the parameters are, layers checkpointed and computed in tiles where known.

    Args:
        model: As for `model_config`.
        gpus: How many.

    Raises:
        ValueError: There is no such model.
    """
    shape, tile = model_config(model), TILE
    try:
        check_tiled_layers(shape)
    except ValueError:
        tile = 0
    return TrainConfig(
        model=model,
        out=f"{NOWHERE}/run",
        data=(DataSource(f"{NOWHERE}/rows"),),
        steps=1,
        memory=MemoryConfig(activation_checkpointing=True, layer_tile=tile),
        parallel=ParallelConfig(context_parallel_size=gpus, fsdp_shard_degree=gpus),
    )
