"""After which steps a run saves, and what it says of a stop that its steps are too long for."""

from __future__ import annotations

import math
import os
import sys

import torch
from torch.distributed import is_torchelastic_launched

from ultralong.training.config import TrainConfig
from ultralong.training.parallel import Processes

PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun gives its ranks to end, from torch 2.12 on
SAVES = 20  # checkpoints of a run whose config does not say how many
DEAREST = 1 / 20  # what saving long steps may take of the time between two checkpoints


def patience() -> float:
    """Seconds that a process has from being told to stop to being killed; infinite where nobody kills it."""
    if not is_torchelastic_launched():
        return math.inf
    return 30.0 if torch.__version__.startswith("2.11.") else float(os.environ.get(PATIENCE) or 30.0)


def steps_between(config: TrainConfig) -> int:
    """Steps between two checkpoints of a run whose steps are short; 0 where only the last is saved."""
    return math.ceil(config.steps / SAVES) if config.save_every == "auto" else config.save_every


class SavePace:
    """Says after each step whether it is saved, the same on all processes.

    A process that is told to stop within a step longer than a stop waits is killed in it, and all steps since the last
    checkpoint are lost. So `save_every: auto` saves each such step, as long as the last save took no more than a
    twentieth of the time that was trained since.

    Args:
        config: The run.
        processes: That agree on seconds where they decide.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self._config, self._processes, self._patience = config, processes, patience()
        self._every = steps_between(config)
        self._watches = config.save_every == "auto" and self._patience < math.inf
        self._trained = self._waited = 0.0

    def due(self, step: int, seconds: float) -> bool:
        """Whether a step is saved; every process asks after every step.

        Args:
            step: Steps that are done.
            seconds: The last one's.
        """
        last = step == self._config.steps or bool(self._every and step % self._every == 0)
        if not self._watches:
            return last
        seconds, waited = self._processes.largest(seconds, self._waited)
        self._trained += seconds
        return last or (seconds > self._patience and waited <= DEAREST * self._trained)

    def saved(self, seconds: float) -> None:
        """Take how long the training has waited for the save of the last step."""
        self._trained, self._waited = 0.0, seconds

    def tell(self, seconds: float) -> None:
        """Say where a step takes longer than a stop waits, and what is done about it, or what to do."""
        every = self._config.save_every
        if seconds <= self._patience or every == 1:
            return
        said = (
            f"note: a step takes {seconds:,.0f} s, and a run that is told to stop has {self._patience:,.0f} s: it "
            "would not end its step. "
        )
        if every == "auto":
            said += (
                f"So each step is saved, unless saves would take more than {DEAREST:.0%} of the time (save_every is "
                "auto), and the step under way is what a stop loses."
            )
            if not self._config.async_checkpoints:
                said += " With async_checkpoints=true the training does not wait for the disk."
        else:
            lost = f"the last {every} steps" if every else "all steps"
            said += (
                f"Up to {lost} would be lost. Save each in the background (save_every=auto async_checkpoints=true), "
                "and only the step under way is."
            )
        print(said, file=sys.stderr)
