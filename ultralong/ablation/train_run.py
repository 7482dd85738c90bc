"""One training run of a study, from its config to a model that can be measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ultralong.launch.local import launch_local
from ultralong.training.adapters.export import ADAPTER
from ultralong.training.adapters.merge import merge_adapter
from ultralong.training.config import TrainConfig
from ultralong.training.loop import train
from ultralong.utils import settings
from ultralong.utils.files import drop_partials

STATES = "checkpoints"


def train_run(config: TrainConfig, processes: int | None, command: str, quiet: bool) -> None:
    """Train, or resume what was stopped, and leave the model in `model/` of the run's folder.

    A LoRA adapter is added to the model that it was trained on, as only whole models are measured and averaged.

    Args:
        config: The run; its `out` is the run's folder.
        processes: Processes on this machine; None trains in this one.
        command: `train`, or `sft`, which trains on answers alone.
        quiet: No progress bars.

    Raises:
        ValueError: The run cannot start, or the adapter cannot be merged.
    """
    out = Path(config.out)
    finished = (out / "result.json").exists()
    removed = out.with_name(f".{out.name}.partial")
    if removed.exists():
        shutil.rmtree(removed)
    if finished and not (config.lora.on and (out / ADAPTER).exists()):
        # Its weights were deleted since: nothing to resume from. It is moved first, as a training refuses a folder that
        # has files and no config.yaml, which a stop while it is deleted would leave.
        os.replace(out, removed)
        shutil.rmtree(removed)
        finished = False
    if not finished:
        stopped = out.exists()  # a first start has nothing to resume from, and needs no note that says so
        if processes is None:
            train(config, resume=stopped, quiet=quiet, answers=command == "sft")
        else:
            file = out.with_name(f"{out.name}.yaml")
            drop_partials(file)
            settings.save(config, file)
            launch_local(file, processes, resume=stopped, quiet=quiet, command=command)
    if config.lora.on:
        merge_adapter([config.model, out / ADAPTER], out / "model")


def is_trained(out: Path) -> bool:
    """Whether a run has its result and its model."""
    return (out / "result.json").exists() and (out / "model").exists()


def has_states(out: Path) -> bool:
    """Whether a run still has checkpoints, as one that is stopped just after it has its model."""
    return (out / STATES).exists()


def remove_states(out: Path) -> None:
    """Delete a finished run's checkpoints.

    It is never resumed, and its states take several times what its model does: dozens of runs fill a disk with them.
    """
    if has_states(out):
        shutil.rmtree(out / STATES)
