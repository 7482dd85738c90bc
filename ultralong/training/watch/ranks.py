"""What each rank of a run spends on its own work and on waiting for the others, and which of them is slow.

A rank that is slow makes all others wait at the next collective, so steps take equally long on every rank. What tells
them apart is the time that each spends in collectives: least on the one that the others wait for.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ultralong.attention.collectives import WaitClock
from ultralong.training.parallel import Processes
from ultralong.training.watch.exchange import GradientExchange
from ultralong.training.watch.hang import Position, Watchdog
from ultralong.training.watch.held_back import HeldBackClock
from ultralong.utils.units import GIB

SLOWER = 1.25  # times the others' median is slow
# And so much above it: what a system does beside a run takes tens of milliseconds, which in a miniature's step is much
# and in the seconds of a long row nothing.
SLOWER_SECONDS = 0.1
IN_A_ROW = 2  # steps in which a rank has to be slow before it is named


class RankWatch:
    """Watches one rank of a run, and compares it with the others after each step.

    Args:
        processes: The run's.
        model: The model as it is trained, wrapped or sharded; None where its exchange is not to be timed.

    Attributes:
        position: Where this rank stands.
        gradients: Times the exchange of gradients.
    """

    def __init__(self, processes: Processes, model: nn.Module | None = None) -> None:
        self.processes, self.position = processes, Position()
        device = processes.accelerator.device
        self.clock = HeldBackClock(device) if device.type == "cpu" else WaitClock(device)
        self.gradients = GradientExchange(self.clock)
        if model is not None and self._ranks > 1:
            self.gradients.measure(model)
        self._hosts: list[str] = []
        self._warm = False  # the first step of a process also makes connections and chooses kernels
        self._slow: tuple[int, int] = (-1, 0)  # the rank that was slowest, and in how many steps in a row

    @property
    def _ranks(self) -> int:
        return self.processes.accelerator.num_processes

    @contextmanager
    def over(self, folder: Path, seconds: float) -> Iterator[None]:
        """Watch while the block runs; does nothing for a single process. All ranks enter together.

        Args:
            folder: The run's, where a hang is recorded.
            seconds: Without any progress after which this process ends.
        """
        if self._ranks == 1:
            yield
            return
        told: list[Any] = [None] * self._ranks
        dist.all_gather_object(told, (socket.gethostname(), time.strftime("hang-%Y%m%d-%H%M%S")))
        self._hosts = [host for host, _ in told]
        rank, record = self.processes.accelerator.process_index, folder / told[0][1]
        watchdog = Watchdog(record, rank, self._hosts, seconds, self.position, self.clock)
        with self.clock.running(), watchdog.running():
            yield

    def begin(self, step: int) -> None:
        """Say that a step (counted from 1) begins; what was waited for since the last one is not its own."""
        self.position.at("reading rows", step)
        self.clock.take()
        self._held_back()

    def _held_back(self) -> float:
        """Seconds since the last call in which other programs had this rank's core; 0 on a GPU, with work ahead."""
        return self.clock.take_held_back() if isinstance(self.clock, HeldBackClock) else 0.0

    def report(self, step: int, seconds: float) -> dict[str, Any]:
        """Compare the ranks of a step: one gather of three numbers; all ranks call it.

        Args:
            step: Counted from 1.
            seconds: That the step took on this rank.

        Returns:
            For the log: `compute_seconds` (not spent in collectives, nor on a CPU while another program had the core),
            `waiting_seconds` (spent in collectives) and `peak_gib` (GPU memory; on a CPU the largest resident set so
            far) of each rank, and the `slowest_rank`. Nothing for a single process.
        """
        if self._ranks == 1 or not self._hosts:
            return {}
        waited = min(self.clock.take(), seconds)
        computed = max(seconds - waited - self._held_back(), 0.0)
        device = self.processes.accelerator.device
        own = torch.tensor([computed, waited, peak_bytes(device) / GIB], dtype=torch.float64, device=device)
        found = own.new_empty(self._ranks, 3)
        dist.all_gather(list(found.unbind()), own)
        compute, waiting, peak = ([round(x, 4) for x in column] for column in found.T.tolist())
        slowest = max(range(self._ranks), key=compute.__getitem__)
        if self.processes.is_main and self._warm:
            self._name_slow(step, compute, slowest)
        self._warm = True
        ranks = {"compute_seconds": compute, "waiting_seconds": waiting, "peak_gib": peak}
        return {"slowest_rank": slowest, "ranks": ranks}

    def _name_slow(self, step: int, compute: Sequence[float], slowest: int) -> None:
        """Say on standard error which rank is slow, once until another one is or none was."""
        usual = statistics.median([x for rank, x in enumerate(compute) if rank != slowest])
        if compute[slowest] < max(SLOWER * usual, usual + SLOWER_SECONDS):
            self._slow = (-1, 0)
            return
        before, count = self._slow
        self._slow = (slowest, count + 1 if slowest == before else 1)
        if self._slow[1] == IN_A_ROW:
            print(
                f"note: step {step:,}: rank {slowest} on {self._hosts[slowest]} is slow: {compute[slowest]:.3g} s of "
                f"its own work, where the others' median is {usual:.3g} s; they wait for it.",
                file=sys.stderr,
            )


def peak_bytes(device: torch.device) -> int:
    """Most memory of this process: allocated on its GPU since the last reset, or resident on the host so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
