"""The few collectives that the schemes use, with one error message when a peer is gone.

Legend: P ranks. Every function is called by all ranks of the group in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup
GroupOrMesh = Group | DeviceMesh | tuple[Group, Group]
DIRECT_RANKS = 8  # as many GPUs as hosts have: every pair of them has a link
BLOCK = torch.complex128  # torch's widest type: 16 bytes, copied bit by bit
# The name changed in torch 2.13; the older one warns there and is the only one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class WaitClock:
    """Adds up how long a process waits in collectives: for the other ranks, and for the transfer itself.

    On a GPU a pair of events of the current stream surrounds each, which nobody waits for; elsewhere the host's clock.

    Attributes:
        standing: The collective in which the host stands now; empty where in none.
        ended: Collectives that the host has left.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.standing, self.ended = "", 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any, str]] = []  # start and end of each collective on a GPU, and what it is

    def now(self) -> Any:
        """The current time: seconds, or an event of the current stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_since(self, start: Any, what: str = "") -> None:
        """Count the time from a moment until now as waiting in a collective."""
        if self._cuda:
            self._events.append((start, self.now(), what))
        else:
            self._seconds += time.perf_counter() - start

    def reached(self) -> tuple[int, str, int]:
        """Changes whenever host or GPU get past a collective: how many, the one it stands in; any thread may ask."""
        events = [(start.query() and not end.query(), end.query(), what) for start, end, what in list(self._events)]
        on_gpu = next((what for begun, _, what in events if begun), "")  # the host may be ahead, and wait for its GPU
        return self.ended, self.standing or on_gpu, sum(ended for _, ended, _ in events)

    def take(self) -> float:
        """Seconds of waiting since the last call. What a GPU has not reached yet counts for the next one."""
        reached = [(pair[1].query(), pair) for pair in self._events]
        past, later = ([pair for done, pair in reached if done is wanted] for wanted in (True, False))
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end, _ in past) / 1000
        self._seconds, self._events = 0.0, later
        return seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """For a while, count what this process waits in all collectives of the library."""
        _clocks.append(self)
        try:
            yield
        finally:
            _clocks.remove(self)


_clocks: list[WaitClock] = []  # no context variable: the backward pass on a GPU has a thread of its own


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Count the time inside as waiting in a collective, where a clock runs."""
    if not _clocks:
        yield
        return
    clock = _clocks[-1]
    clock.standing, start = what, clock.now()
    try:
        yield
    finally:
        clock.add_since(start, what)
        clock.standing, clock.ended = "", clock.ended + 1


class PeerLost(RuntimeError):
    """A collective failed or timed out: another rank most likely died."""


def _lost(what: str, group: Group, error: Exception) -> PeerLost:
    return PeerLost(
        f"{what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} in sequence-parallel attention: "
        "a peer has died, or did not arrive before the process group's timeout. Look for the first error in the other "
        f"ranks' logs. ({type(error).__name__}: {error})"
    )


@dataclass
class Pending:
    """A collective under way; `wait` returns its result."""

    what: str
    group: Group
    handles: list[Any]
    result: Tensor
    keep: tuple[Tensor, ...] = ()  # buffers that must live until it has ended

    def wait(self) -> Tensor:
        """The result, once it is there (on a GPU: ordered before later work of the current stream)."""
        try:
            with waiting(self.what):
                for handle in self.handles:
                    handle.wait()
        except RuntimeError as error:
            raise _lost(self.what, self.group, error) from error
        self.handles, self.keep = [], ()
        return self.result


@dataclass
class Exchange:
    """Tensors under way between all pairs of ranks; `wait` copies what could not be received in place."""

    pending: Pending
    to_copy: list[tuple[Tensor, Tensor]]  # where it belongs, and the contiguous buffer it was received in

    def wait(self) -> None:
        """Wait until everything is in its place."""
        self.pending.wait()
        for target, received in self.to_copy:
            copy_rows(target, received)
        self.to_copy = []


def all_to_all(x: Tensor, group: Group) -> Pending:
    """Send `x[p]` to rank p; the result's `[p]` came from rank p. `x` is (P, ...) contiguous."""
    result = torch.empty_like(x)
    try:
        handle = dist.all_to_all_single(result, x, group=group, async_op=True)
    except RuntimeError as error:
        raise _lost("all-to-all", group, error) from error
    return Pending("all-to-all", group, [handle], result, (x,))


def all_gather(x: Tensor, group: Group, into: Tensor | None = None, direct: bool = True) -> Pending:
    """Everyone's `x`, contiguous, as (P, ...) in rank order; `x` may be this rank's part of `into`, the result.

    With `direct`, GPUs of one host send to each other: so few are faster than by NCCL's own choice of ring and protocol
    (notebooks/results/design_measurements.md, "All-gather").
    """
    rank, size, on_gpu = dist.get_rank(group), dist.get_world_size(group), x.device.type == "cuda"
    result = x.new_empty((size, *x.shape)) if into is None else into
    if direct and on_gpu and size <= DIRECT_RANKS:
        peers = [((rank + step) % size, (rank - step) % size) for step in range(1, size)]
        pending = _send_and_receive(
            "all-gather", [(x, after, result[before], before) for after, before in peers], group, 0, result
        )
        if into is None:
            result[rank].copy_(x)
        return pending
    x = x if on_gpu or into is None else x.clone()  # NCCL's may be in place
    try:
        handle = _all_gather(result.flatten(0, 1), x, group=group, async_op=True)
    except RuntimeError as error:
        raise _lost("all-gather", group, error) from error
    return Pending("all-gather", group, [handle], result, (x,))


def exchange(
    outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], group: Group, tag: int = 0
) -> Exchange:
    """Send each rank its tensors and receive from each, without copies where they are contiguous.

    Args:
        outgoing: For every rank the tensors that go to it, none to this rank itself.
        incoming: For every rank where its tensors are received, of the shapes and in the order in which it sends them.
        group: The ranks.
        tag: As for `ring_send_recv`; that of a pair's first tensor, the next ones have the next numbers.
    """
    _connect(group)
    operations, to_copy, kept = [], [], []
    for rank, (sent, received) in enumerate(zip(outgoing, incoming, strict=True)):
        peer = dist.get_global_rank(group, rank)
        for number, x in enumerate(sent):
            kept.append(x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format))
            if kept[-1] is not x:
                copy_rows(kept[-1], x)
            operations.append(dist.P2POp(dist.isend, kept[-1], peer, group, tag + number))
        for number, x in enumerate(received):
            place = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
            if place is not x:
                to_copy.append((x, place))
            operations.append(dist.P2POp(dist.irecv, place, peer, group, tag + number))
    return Exchange(_started("exchange", operations, group, kept), to_copy)


def ring_send_recv(x: Tensor, group: Group, tag: int = 0, recv_shape: Sequence[int] | None = None) -> Pending:
    """Send `x` to the next rank of the ring and receive the previous rank's.

    Transfers under way at the same time need tags of their own where the backend has them (gloo); NCCL goes by order.

    Args:
        x: What to send, contiguous; nothing is sent where it has no elements.
        group: The ring.
        tag: See above.
        recv_shape: Shape of what is received, where it is not x's.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    result = x.new_empty(x.shape if recv_shape is None else recv_shape)
    return _send_and_receive(
        "ring send and receive", [(x, (rank + 1) % size, result, (rank - 1) % size)], group, tag, result
    )


def _send_and_receive(
    what: str, pairs: list[tuple[Tensor, int, Tensor, int]], group: Group, tag: int, result: Tensor
) -> Pending:
    """Start sends and receives together: (what to send, to whom, where to receive, from whom), ranks of the group."""
    _connect(group)
    operations = []
    for outgoing, after, incoming, before in pairs:
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, dist.get_global_rank(group, after), group, tag))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, dist.get_global_rank(group, before), group, tag))
    pending = _started(what, operations, group, [pair[0] for pair in pairs])
    pending.result = result
    return pending


def _started(what: str, operations: list[dist.P2POp], group: Group, kept: Sequence[Tensor]) -> Pending:
    try:
        handles = dist.batch_isend_irecv(operations) if operations else []
    except RuntimeError as error:
        raise _lost(what, group, error) from error
    return Pending(what, group, handles, torch.empty(0), tuple(kept))


@cache
def _connect(group: Group) -> None:
    """Make a group's connections before its first sends: with NCCL all ranks must take part in that, even idle ones."""
    if dist.get_backend(group) == "nccl":
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


def copy_rows(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, 16 bytes at a time where the rows of the last dimension allow it.

    torch copies strided tensors one element at a time, which for 2-byte types reaches a third of the memory's speed.
    """
    if target.dtype == source.dtype and _in_blocks(target) and _in_blocks(source):
        target, source = target.view(BLOCK), source.view(BLOCK)
    target.copy_(source)


def _in_blocks(x: Tensor) -> bool:
    """Whether a tensor can be seen as one of `BLOCK`s."""
    each = BLOCK.itemsize // x.element_size()
    return (
        x.dim() > 0
        and x.stride(-1) == 1
        and x.shape[-1] % each == 0
        and x.storage_offset() % each == 0
        and x.data_ptr() % BLOCK.itemsize == 0
        and all(stride % each == 0 for stride in x.stride()[:-1])
    )


def two_levels(group: GroupOrMesh | None) -> tuple[Group | None, Group | None]:
    """(outer, inner) groups; a group of one process is none."""
    if group is None:
        return None, None
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            raise ValueError(f"group must be a mesh of 1 or 2 dimensions (hosts, inside a host), found {group.ndim}")
        group = group.get_group() if group.ndim == 1 else (group.get_group(0), group.get_group(1))
    outer, inner = group if isinstance(group, tuple) else (group, None)
    members: list[Group | None] = [outer, inner]
    for member in members:
        if member is not None and dist.get_rank(member) < 0:
            raise ValueError(
                f"process {dist.get_rank()} is not a member of the group that it passed to make_attention_context"
            )
    first, second = (None if g is None or dist.get_world_size(g) == 1 else g for g in members)
    return (first, second) if first is not None or second is None else (second, None)
