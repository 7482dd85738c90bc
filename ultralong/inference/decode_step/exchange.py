"""How ranks join their attention of one new token: each layer's results and log-sum-exps, a few KiB of each rank.

P ranks, B sequences, H query heads, D head size. One layer after the other: `place`, attention that is written there,
`joined`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, all_gather

WAYS = ("direct", "gather", "symmetric")


def make_exchange(way: str, group: Group, layers: int, operations: Any) -> Exchange:
    """An exchange of a group.

    Args:
        way: `direct` sends to each rank, `gather` takes the backend's all-gather, and `symmetric` reads the others'
            memory where a kernel needs it (torch's symmetric memory: GPUs of one host, two layers or more).
        group: The ranks.
        layers: Of the model.
        operations: `kernels` or `plain`.

    Raises:
        ValueError: Another way, or one that layers or device don't allow.
    """
    if way not in WAYS:
        raise ValueError(f"exchange takes {', '.join(WAYS)}, found {way!r}")
    if way != "symmetric":
        return _Collected(group, operations, direct=way == "direct")
    if layers < 2 or not hasattr(operations, "merge_at"):
        raise ValueError("exchange: symmetric is for GPUs and models of two layers or more")
    return _Symmetric(group, operations, layers)


class Exchange(ABC):
    """See on top; every rank calls the same in the same order."""

    @abstractmethod
    def place(self, layer: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where this rank's results (B, H, D) and base-2 log-sum-exps (B, H) of a layer are to be written."""

    @abstractmethod
    def joined(self, dtype: torch.dtype) -> Tensor:
        """All ranks' results of that layer as one, (B, H, D) of a type."""


class _Collected(Exchange):
    """Everyone's part is sent to everyone, straight from where attention left it to where it is merged."""

    def __init__(self, group: Group, operations: Any, direct: bool) -> None:
        self._group, self._do, self._direct = group, operations, direct
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def place(self, layer: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        self._all = torch.empty(self._ranks, shape.numel() + shape[:-1].numel(), dtype=dtype, device=device)
        self._shape = shape
        outs, lses = _views(self._all, shape)
        return outs[self._rank], lses[self._rank]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """See `Exchange`."""
        found = all_gather(self._all[self._rank], self._group, self._all, self._direct).wait()
        out: Tensor = self._do.merge_gathered(found, self._shape, dtype)
        return out


class _Symmetric(Exchange):
    """Each rank writes into memory that all can read; behind a barrier the merging kernel reads it from them.

    A layer's place is written again a step later: by then the others have passed the barrier of a later layer, before
    which they had read it. So one barrier a layer is enough, and takes two layers or more.
    """

    def __init__(self, group: Group, operations: Any, layers: int) -> None:
        self._group, self._do, self._layers = group, operations, layers
        self._held = torch.empty(0)

    def place(self, layer: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """See `Exchange`. The first call of a shape allocates, on all ranks together and outside of a CUDA graph."""
        count = shape.numel() + shape[:-1].numel()
        if self._held.shape != (self._layers, count):
            from torch.distributed import _symmetric_memory as symmetric

            self._held = symmetric.empty(self._layers, count, dtype=dtype, device=device)
            self._handle: Any = symmetric.rendezvous(self._held, self._group)
            ranks = range(dist.get_world_size(self._group))
            parts = [self._handle.get_buffer(rank, self._held.shape, dtype).data_ptr() for rank in ranks]
            self._pointers = torch.tensor(parts, device=device)  # (P,)
        self._layer, self._shape = layer, shape
        outs, lses = _views(self._held, shape)
        return outs[layer], lses[layer]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """See `Exchange`."""
        self._handle.barrier()
        start = self._layer * self._held.shape[1]
        out: Tensor = self._do.merge_at(self._pointers, start, self._shape, dtype)
        return out


def _views(flat: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Results (N, B, H, D) and log-sum-exps (N, B, H) of what holds one behind the other, (N, B H D + B H)."""
    count = shape.numel()
    return flat[:, :count].unflatten(1, shape), flat[:, count:].unflatten(1, shape[:-1])
