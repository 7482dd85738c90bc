"""A training run over several forked processes, which start in a moment; torchrun imports everything in each of them.

What only torchrun and the command line do (start, environment, messages, exit codes) is proved where they are tested.
"""

from __future__ import annotations

import os

from ultralong.training.config import TrainConfig
from ultralong.training.loop import train
from ultralong.utils.local_ranks import run_ranks


def train_over(config: TrainConfig, processes: int, resume: bool = False) -> None:
    """Run `train(config)` in `processes` processes of one gloo group.

    Raises:
        RankFailed: A process raised; the message holds its traceback.
    """
    run_ranks(_rank, processes, config, resume)


def _rank(rank: int, world: int, config: TrainConfig, resume: bool) -> None:
    # What torchrun would have set, which accelerate reads to find its place.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    train(config, resume=resume, quiet=True)
