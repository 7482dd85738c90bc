"""The few collectives that the schemes use, with one error message when a peer is gone.

Legend: P ranks. Every function is called by all ranks of the group in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# The name changed in torch 2.13; the older one warns there and is the only one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PeerLost(RuntimeError):
    """A collective failed or timed out: another rank most likely died."""


def _lost(what: str, group: Group, error: Exception) -> PeerLost:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return PeerLost(
        f"{what} failed on rank {rank} of {size} in sequence-parallel attention: a peer has died, or did not arrive "
        "before the process group's timeout. Look for the first error in the other ranks' logs. "
        f"({type(error).__name__}: {error})")


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
            for handle in self.handles:
                handle.wait()
        except RuntimeError as error:
            raise _lost(self.what, self.group, error) from error
        self.handles, self.keep = [], ()
        return self.result


def all_to_all(x: Tensor, group: Group) -> Pending:
    """Send `x[p]` to rank p; the result's `[p]` came from rank p. `x` is (P, ...) contiguous."""
    result = torch.empty_like(x)
    try:
        handle = dist.all_to_all_single(result, x, group=group, async_op=True)
    except RuntimeError as error:
        raise _lost("all-to-all", group, error) from error
    return Pending("all-to-all", group, [handle], result, (x,))


def all_gather(x: Tensor, group: Group) -> Pending:
    """Everyone's `x` as (P, ...), in rank order. `x` is contiguous."""
    result = x.new_empty((dist.get_world_size(group), *x.shape))
    try:
        handle = _all_gather(result.flatten(0, 1), x, group=group, async_op=True)
    except RuntimeError as error:
        raise _lost("all-gather", group, error) from error
    return Pending("all-gather", group, [handle], result, (x,))


def pass_on(x: Tensor, group: Group, tag: int = 0) -> Pending:
    """Send `x` to the next rank of the ring, receive the previous rank's. `x` is contiguous.

    Transfers under way at the same time need tags of their own where the backend has them (gloo); NCCL goes by order.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    result = torch.empty_like(x)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    try:
        handles = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, after, group, tag),
                                          dist.P2POp(dist.irecv, result, before, group, tag)])
    except RuntimeError as error:
        raise _lost("ring send and receive", group, error) from error
    return Pending("ring send and receive", group, handles, result, (x,))
