"""Times of forward and backward passes that several ranks run together.

Two times are of interest, and they differ by what the host does before the first kernel runs, some milliseconds. In a
training step a GPU is behind its host and never waits for it: there counts the time from one kernel to another. A call
on its own, on an idle GPU, has to wait: that is its latency. `measure` can take either.

All ranks begin each pass together: one that is done with its forward pass earlier would else wait for the others in
what is timed as its backward pass, and the sum of the slowest rank's times would count the same wait twice.

Legend: B batch, T tokens, H query heads, D head size, P ranks.
"""

from __future__ import annotations

import math
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


class Ahead:
    """Products that keep a GPU busy while the host starts what is timed.

    Args:
        device: A CUDA device.

    Attributes:
        bytes: Memory of the device that it holds.
    """

    SIZE = 4096
    MOST = 0.3  # seconds

    def __init__(self, device: torch.device) -> None:
        self._x = torch.randn(self.SIZE, self.SIZE, device=device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._x)
        self.bytes = 2 * self._x.numel() * self._x.element_size()
        for _ in range(2):  # the first time they are chosen
            marks = [_mark(device)]
            self._products(20)
            marks.append(_mark(device))
            torch.cuda.synchronize()
        self._each = marks[0].elapsed_time(marks[1]) / 1e3 / 20

    def fill(self, seconds: float) -> None:
        """Start products that take so long, `MOST` at most."""
        self._products(math.ceil(min(seconds, self.MOST) / self._each))

    def _products(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._x, self._x, out=self._out)


def causal_flops(tokens: int, heads: int, head_size: int, boundaries: Sequence[int] | None = None) -> float:
    """Useful floating-point operations of one forward and backward pass: 3.5 times 2 n^2 H D for each document.

    The rule counts the causal half of the score matrix only (the full square would be 4 n^2 H D forward), and no
    recomputation. Packed documents that don't see each other count one by one.
    """
    lengths = [b - a for a, b in pairwise(boundaries or (0, tokens))]
    return (1 + BACKWARD_WORK) * 2.0 * heads * head_size * sum(float(n) ** 2 for n in lengths)


def measure(
    attend: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dout: Tensor,
    *,
    repeats: int = 5,
    budget: float = 30.0,
    idle: bool = False,
) -> Times:
    """Time `attend(q, k, v)` and its backward pass on all ranks of the default group (or on this process alone).

    Args:
        attend: What is timed.
        inputs: Its arguments; gradients of all of them are computed.
        dout: Gradient of its result.
        repeats: Timed runs at most, after two that are not timed (kernels are compiled and chosen in the first), or
            three where they are short.
        budget: Seconds of timed runs after which no further one is started (there is always one).
        idle: Begin on an idle GPU, so that the host's work before the first kernel counts. Otherwise the GPU computes
            something else until the host has started everything, as in the middle of a training step.
    """
    leaves, device = [x.detach().clone().requires_grad_() for x in inputs], dout.device
    cuda, host = device.type == "cuda", 0.0
    for run in range(3):
        forward, backward, host = _slowest(_once(attend, leaves, dout), device)
        if forward + backward > LONG and run:
            break
    ahead = Ahead(device) if cuda and not idle else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[tuple[float, ...]] = []
    while len(times) < repeats and sum(map(sum, times)) < budget:
        times.append(_slowest(_once(attend, leaves, dout, ahead, 1.5 * host), device)[:2])
    peak = (torch.cuda.max_memory_allocated() - (ahead.bytes if ahead else 0)) / 2**30 if cuda else 0.0
    forward, backward = (median(column) for column in zip(*times))
    return Times(forward, backward, len(times), _slowest((peak,), device)[0])


def _once(
    attend: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    dout: Tensor,
    ahead: Ahead | None = None,
    seconds: float = 0.0,
) -> tuple[float, float, float]:
    """Seconds of one forward and one backward pass on this rank, begun with the others', and of the host to start both.

    Args:
        attend: What is timed.
        leaves: Its arguments.
        dout: Gradient of its result.
        ahead: What the GPU computes before, while the host starts the passes; nothing, if None.
        seconds: How long.
    """
    for leaf in leaves:
        leaf.grad = None
    _arrive(dout.device)
    if ahead is not None:
        ahead.fill(seconds)
        _meet(dout.device)
    began = time.perf_counter()
    marks = [_mark(dout.device)]
    out = attend(*leaves)
    marks.append(_mark(dout.device))
    _meet(dout.device)
    marks.append(_mark(dout.device))
    out.backward(dout)
    marks.append(_mark(dout.device))
    host = time.perf_counter() - began
    if dout.device.type != "cuda":
        return marks[1] - marks[0], marks[3] - marks[2], host
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[2].elapsed_time(marks[3]) / 1e3, host


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _meet(device: torch.device) -> None:
    """Let ranks go on together; a GPU's host goes on at once."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device))


def _arrive(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _slowest(values: tuple[float, ...], device: torch.device) -> tuple[float, ...]:
    """The largest of each over ranks: all ranks then agree, also on when to stop."""
    if not dist.is_initialized():
        return values
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(found.tolist())
