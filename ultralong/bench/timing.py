"""Times of forward and backward passes that several ranks run together.

Legend: B batch, T tokens, H query heads, D head size, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

LONG = 0.25  # seconds of a run that needs no more warming up
BACKWARD_WORK = 2.5  # times the forward's: five matrix products against two


@dataclass(frozen=True)
class Times:
    """Seconds of the slowest rank, medians over repeats, and the most memory any rank needed at once."""

    forward: float
    backward: float
    repeats: int
    peak_gib: float

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def causal_flops(tokens: int, heads: int, head_size: int, boundaries: Sequence[int] | None = None) -> float:
    """Useful floating-point operations of one forward and backward pass: 3.5 times 2 n^2 H D for each document.

    The rule counts the causal half of the score matrix only (the full square would be 4 n^2 H D forward), and no
    recomputation. Packed documents that don't see each other count one by one.
    """
    lengths = [b - a for a, b in pairwise(boundaries or (0, tokens))]
    return (1 + BACKWARD_WORK) * 2.0 * heads * head_size * sum(float(n) ** 2 for n in lengths)


def measure(attend: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor, *, repeats: int = 5,
            budget: float = 30.0) -> Times:
    """Time `attend(q, k, v)` and its backward pass on all ranks of the default group (or on this process alone).

    Args:
        attend: What is timed.
        inputs: Its arguments; gradients of all of them are computed.
        dout: Gradient of its result.
        repeats: Timed runs at most, after two that are not timed (kernels are compiled and chosen in the first), or
            three where they are short.
        budget: Seconds of timed runs after which no further one is started (there is always one).
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cuda = dout.device.type == "cuda"
    for run in range(3):
        if sum(_slowest(_once(attend, leaves, dout), dout.device)) > LONG and run:
            break
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[tuple[float, float]] = []
    while len(times) < repeats and sum(map(sum, times)) < budget:
        times.append(_slowest(_once(attend, leaves, dout), dout.device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    forward, backward = (median(column) for column in zip(*times))
    return Times(forward, backward, len(times), _slowest((peak, 0.0), dout.device)[0])


def _once(attend: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward pass on this rank, begun together."""
    for leaf in leaves:
        leaf.grad = None
    _arrive(dout.device)
    marks = [_mark(dout.device)]
    out = attend(*leaves)
    marks.append(_mark(dout.device))
    out.backward(dout)
    marks.append(_mark(dout.device))
    if dout.device.type != "cuda":
        return marks[1] - marks[0], marks[2] - marks[1]
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _arrive(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _slowest(values: tuple[float, float], device: torch.device) -> tuple[float, float]:
    """The larger of each over ranks: all ranks then agree, also on when to stop."""
    if not dist.is_initialized():
        return values
    both = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    first, second = both.tolist()
    return first, second
