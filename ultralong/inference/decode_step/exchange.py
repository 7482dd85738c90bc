"""How ranks join their attention of one new token: each layer's results and log-sum-exps, a few KiB of each rank.

P ranks, B sequences, H query heads, D head size. One layer after the other: `place`, attention that is written there,
`joined`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, all_gather
from ultralong.inference.decode_step.peer_memory import PeerMemory, Unavailable, share

WAYS = ("auto", "direct", "gather", "symmetric")

log = logging.getLogger(__name__)


def make_exchange(way: str, group: Group, layers: int, operations: Any, part: int, device: torch.device) -> Exchange:
    """An exchange of a group; called by all ranks together, which get the same.

    Args:
        way: `direct` sends to each rank, `gather` takes the backend's all-gather, and `symmetric` reads the others'
            memory where a kernel needs it (torch's symmetric memory: GPUs of one host, two layers or more). `auto` is
            `symmetric` where all ranks can have it, else `direct`; on GPUs the log says which.
        group: The ranks.
        layers: Of the model.
        operations: `kernels` or `plain`.
        part: Elements of one rank's results and log-sum-exps of a layer and sequence, H D + H.
        device: Of this rank.

    Raises:
        ValueError: Another way, or one that layers, device or another rank don't allow.
    """
    if way not in WAYS:
        raise ValueError(f"exchange takes {', '.join(WAYS)}, found {way!r}")
    able = layers > 1 and hasattr(operations, "merge_at")
    if way == "symmetric" and not able:
        raise ValueError("exchange: symmetric is for GPUs and models of two layers or more")
    direct = _Collected(group, operations, direct=way != "gather")
    if way in ("direct", "gather") or not able:
        return direct
    otherwise = direct if way == "auto" else None
    return _Symmetric(group, operations, layers, part, device, otherwise)


class Exchange(ABC):
    """See on top; every rank calls the same in the same order."""

    @property
    @abstractmethod
    def way(self) -> str:
        """One of WAYS, never `auto`."""

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

    @property
    def way(self) -> str:
        """See `Exchange`."""
        return "direct" if self._direct else "gather"

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

    The memory is made once, for one sequence, and serves every prompt. More sequences at a time than ever before get
    larger memory in its place: a batch's shape is no reason to make it anew. A rank that is lost in a step leaves the
    others' GPUs at a barrier that has no timeout: who started the processes ends them.

    Args:
        group: The ranks.
        operations: `kernels`.
        layers: Of the model.
        part: See `make_exchange`.
        device: Of this rank.
        otherwise: What is done where ranks can't share memory; None raises.

    Raises:
        ValueError: Ranks can't share memory.
    """

    def __init__(
        self, group: Group, operations: Any, layers: int, part: int, device: torch.device, otherwise: Exchange | None
    ) -> None:
        self._group, self._do, self._layers, self._otherwise = group, operations, layers, otherwise
        self._memory: PeerMemory | None = None
        self._reserve(part, device)

    @property
    def way(self) -> str:
        """See `Exchange`."""
        if self._memory is None and self._otherwise is not None:
            return self._otherwise.way
        return "symmetric"

    def _reserve(self, width: int, device: torch.device) -> None:
        """Have memory for so many elements of a layer."""
        speaks, self._memory = dist.get_rank(self._group) == 0, None
        try:
            self._memory = share(self._layers * width, device, self._group)
        except Unavailable as error:
            if self._otherwise is None:
                raise ValueError(f"exchange: symmetric can't be set up ({error})") from error
            if speaks:
                log.info("decoding steps send attention to each GPU (exchange direct): %s", error)
            return
        if speaks:
            log.info("decoding steps read attention from each GPU's memory (exchange symmetric)")
        self._width = width
        self._held = self._memory.own.view(self._layers, width)

    def place(self, layer: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """See `Exchange`. More sequences than before allocate, on all ranks together and outside of a CUDA graph."""
        count = shape.numel() + shape[:-1].numel()
        if self._memory is None and self._otherwise is None:
            self._reserve(count, device)  # it failed for more sequences: it is refused again, by all
        elif self._memory is not None and count > self._width:
            self._reserve(count, device)
        if self._memory is None and self._otherwise is not None:
            return self._otherwise.place(layer, shape, dtype, device)
        self._layer, self._shape = layer, shape
        outs, lses = _views(self._held[:, :count], shape)
        return outs[layer], lses[layer]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """See `Exchange`."""
        memory = self._memory
        if memory is None:
            assert self._otherwise is not None
            return self._otherwise.joined(dtype)
        memory.barrier()
        out: Tensor = self._do.merge_at(memory.pointers, self._layer * self._width, self._shape, dtype)
        return out


def _views(flat: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Results (N, B, H, D) and log-sum-exps (N, B, H) of what holds one behind the other, (N, B H D + B H)."""
    count = shape.numel()
    return flat[:, :count].unflatten(1, shape), flat[:, count:].unflatten(1, shape[:-1])
