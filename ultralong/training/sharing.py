"""How the rows of a run are shared where its config says auto: asked of the planner once, kept by the run's folder.

The planner stands above the trainer, so whoever starts a run hands the question in (`Decide`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ultralong.training.config import TrainConfig
from ultralong.training.parallel import on_main
from ultralong.training.parallel_config import DECIDED_BY
from ultralong.training.run_folder import RunFolder
from ultralong.utils import settings
from ultralong.utils.files import read_json, write_json

SHARING = "sharing.json"  # what was decided at the run's start, and why


@dataclass(frozen=True)
class SharingDecision:
    """How the rows of a run are shared.

    Attributes:
        context_parallel_size: As in `ParallelConfig`, a number.
        dynamic_context_parallel: As in `ParallelConfig`, true or false.
        gpus: Processes that it was decided for.
        machine: The GPU whose rates decided.
        reason: Why, as a sentence.
        choices: What there was to choose from: `dynamic_context_parallel`, `context_parallel_size`, and either
            `seconds` of a step and `gpu_gib` of each GPU, as planned, or `refused`, why no run takes it.
    """

    context_parallel_size: int
    dynamic_context_parallel: bool
    gpus: int
    machine: str
    reason: str
    choices: tuple[dict[str, Any], ...] = ()

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The config with the decision in the place of auto."""
        return replace(
            config, parallel=config.parallel.decided(self.context_parallel_size, self.dynamic_context_parallel)
        )


# What decides for a config and a number of processes: `ultralong.planner.decide_sharing`.
Decide = Callable[[TrainConfig, int], SharingDecision]


def decided(
    config: TrainConfig, accelerator: Accelerator, resume: bool, decide: Decide | None
) -> tuple[TrainConfig, SharingDecision | None]:
    """A config without auto, the same on all processes, which all call this; and the decision where it was made now.

    A run that is resumed keeps what its folder says, on whatever number of processes it is resumed.

    Raises:
        ValueError: Every way is refused, or there is nobody to decide.
    """
    if not config.parallel.undecided:
        return config, None

    def ask() -> tuple[SharingDecision, bool]:
        folder = RunFolder(Path(config.out))
        if resume and (before := kept(folder, config, accelerator.num_processes)):
            return before, False
        if decide is None:
            raise ValueError(f"how rows are shared (parallel) is auto: {DECIDED_BY}.")
        return decide(config, accelerator.num_processes), True

    found, is_new = on_main(ask, accelerator)
    if accelerator.is_main_process:
        print(f"note: {found.reason}", file=sys.stderr)
    return found.applied(config), found if is_new else None


def kept(folder: RunFolder, config: TrainConfig, gpus: int) -> SharingDecision | None:
    """How a run's folder says that its rows are shared; a setting that the config itself makes is left to it.

    None where no run has decided it there: the folder is new, or its config.yaml is the one that `launch` wrote.
    """
    if not folder.config.exists():
        return None
    before, now = settings.load(TrainConfig, folder.config).parallel, config.parallel
    if before.undecided:
        return None
    size = before.shared_by if now.context_parallel_size == "auto" else now.shared_by
    dynamic = before.dynamic if now.dynamic_context_parallel == "auto" else now.dynamic
    said = f"{folder.path} keeps how its rows are shared: {named(size, dynamic)}"
    why = reason_of(folder)
    return SharingDecision(size, dynamic, gpus, "", f"{said}. At its start: {why}" if why else f"{said}.")


def named(size: int, dynamic: bool) -> str:
    """A way of sharing rows as a sentence names it."""
    if not dynamic:
        return f"a fixed degree of {size}"
    return f"dynamic sharing by up to {size}" if size > 1 else "dynamic packs of rows on one GPU each"


def reason_of(folder: RunFolder) -> str:
    """Why a run's rows are shared as they are; empty where it was not decided, or can't be read."""
    try:
        found = read_json(folder.path / SHARING)
    except (OSError, ValueError):
        return ""  # the settings themselves are in config.yaml
    return str(found.get("reason", "")) if isinstance(found, dict) else ""


def leave(folder: RunFolder, decision: SharingDecision | None) -> None:
    """Write a decision that was made now to the run's folder."""
    if decision is not None:
        write_json(folder.path / SHARING, asdict(decision))
