"""Throughput and latency of forward and backward passes that several ranks run together.

The two differ by what the host does before the first kernel runs, some milliseconds. In a training step the host is
ahead of its GPU, so only the time from kernel to kernel counts: throughput. A call on an idle GPU has to wait for the
host: latency. `measure_passes` can take either.

All ranks begin each pass together. A rank that finished its forward pass early would otherwise wait for the others in
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

from ultralong.utils.units import GIB

WARM_SECONDS = 0.25  # a run as long as this needs no further warm-up
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


class Backlog:
    """Matrix products that keep a GPU busy while the host starts what is timed.

    Args:
        device: A CUDA device.

    Attributes:
        bytes: Memory of the device that it holds.
    """

    SIZE = 4096
    MOST_SECONDS = 0.3

    def __init__(self, device: torch.device) -> None:
        self._x = torch.randn(self.SIZE, self.SIZE, device=device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._x)
        self.bytes = 2 * self._x.numel() * self._x.element_size()
        for _ in range(2):  # in the first round the library still chooses its kernel
            begin = _mark(device)
            self._products(20)
            end = _mark(device)
            torch.cuda.synchronize()
        self._each = _seconds(begin, end) / 20

    def fill(self, seconds: float) -> None:
        """Start products that take this many seconds, at most `MOST_SECONDS`."""
        self._products(math.ceil(min(seconds, self.MOST_SECONDS) / self._each))

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


def measure_passes(
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
        if forward + backward > WARM_SECONDS and run:
            break
    backlog = Backlog(device) if cuda and not idle else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[tuple[float, ...]] = []
    while len(times) < repeats and sum(map(sum, times)) < budget:
        times.append(_slowest(_once(attend, leaves, dout, backlog, 1.5 * host), device)[:2])
    peak = (torch.cuda.max_memory_allocated() - (backlog.bytes if backlog else 0)) / GIB if cuda else 0.0
    forward, backward = (median(column) for column in zip(*times))
    return Times(forward, backward, len(times), _slowest((peak,), device)[0])


def _once(
    attend: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    dout: Tensor,
    backlog: Backlog | None = None,
    seconds: float = 0.0,
) -> tuple[float, float, float]:
    """Seconds of a forward pass, of a backward pass, and of the host to start both, on this rank.

    Args:
        attend: What is timed.
        leaves: Its arguments.
        dout: Gradient of its result.
        backlog: What the GPU computes before, while the host starts the passes; None starts on an idle GPU.
        seconds: Seconds of that work.
    """
    for leaf in leaves:
        leaf.grad = None
    _wait_for_all(dout.device)
    if backlog is not None:
        backlog.fill(seconds)
        # The exchange below is queued behind the backlog on every GPU, so that all start the pass at the same moment.
        _align(dout.device)
    began = time.perf_counter()
    marks = [_mark(dout.device)]
    out = attend(*leaves)
    marks.append(_mark(dout.device))
    _align(dout.device)
    marks.append(_mark(dout.device))
    out.backward(dout)
    marks.append(_mark(dout.device))
    host = time.perf_counter() - began
    if dout.device.type == "cuda":
        torch.cuda.synchronize()
    return _seconds(marks[0], marks[1]), _seconds(marks[2], marks[3]), host


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """A moment: on a GPU an event among its kernels, as the host runs ahead of them."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds between two marks of one device, which has passed both."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    raise AssertionError("marks of two devices")


def _align(device: torch.device) -> None:
    """Let the ranks' devices continue together; the host of a GPU does not wait."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device))


def _wait_for_all(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _slowest(values: tuple[float, ...], device: torch.device) -> tuple[float, ...]:
    """The largest of each value over the ranks, so that all ranks agree, also on when to stop."""
    if not dist.is_initialized():
        return values
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(found.tolist())
