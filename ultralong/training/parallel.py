"""Processes: who works on which row, and the sums over all of them. Launching and devices are accelerate's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from ultralong.training.config import TrainConfig


@dataclass(frozen=True)
class Processes:
    """This process and its place among the others.

    Processes `k * sequence .. (k + 1) * sequence - 1` share rows; `k` is the data rank.

    Attributes:
        accelerator: accelerate's handle: device, launch, trackers, wrapping.
        sequence: Processes that share a row.
        group: The process group of those, None when alone.
    """

    accelerator: Accelerator
    sequence: int
    group: dist.ProcessGroup | None

    @property
    def data_rank(self) -> int:
        """Number of this process's group."""
        return self.accelerator.process_index // self.sequence

    @property
    def data_ranks(self) -> int:
        """Groups that work on different rows."""
        return self.accelerator.num_processes // self.sequence

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and bars."""
        return self.accelerator.is_main_process

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes."""
        if self.accelerator.num_processes > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


@contextmanager
def connect(config: TrainConfig) -> Iterator[Processes]:
    """Join the processes of the run, and leave the group at the end if this call made it.

    Raises:
        ValueError: The number of processes does not fit `parallel.sequence` or `rows_per_step`.
    """
    mine = not dist.is_initialized()
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.out,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    try:
        world, sequence = accelerator.num_processes, config.parallel.sequence
        if world % sequence:
            raise ValueError(
                f"parallel.sequence is {sequence}, but this run has {world} process{'es' * (world > 1)}. Start a "
                f"multiple of {sequence}, for example: torchrun --nproc-per-node {sequence} -m ultralong train ..."
            )
        if config.rows_per_step % (world // sequence * config.rows_at_once):
            raise ValueError(
                f"rows_per_step ({config.rows_per_step}) must be a multiple of {world // sequence} groups x "
                f"rows_at_once ({config.rows_at_once})."
            )
        group = None
        for first in range(0, world, sequence) if sequence > 1 else ():
            ranks = list(range(first, first + sequence))
            made = dist.new_group(ranks, timeout=timeout)
            group = made if accelerator.process_index in ranks else group
        yield Processes(accelerator, sequence, group)
    finally:
        accelerator.free_memory()
        # accelerate keeps one state per interpreter; without this a second run could not choose another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        if mine and dist.is_initialized():
            dist.destroy_process_group()
