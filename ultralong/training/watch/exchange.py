"""Timing what FSDP2 and DistributedDataParallel exchange, which happens inside of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ultralong.attention.collectives import WaitClock, waiting

# The names changed in torch 2.13; the older ones warn there and are the only ones before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Communication:
    """What FSDP2 takes for a collective of its own: memory is allocated as it does by itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Communication):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with waiting("all-gather of parameters"):
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Communication):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        with waiting("reduce-scatter of gradients"):
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


class GradientExchange:
    """Times a model's collectives. Those of FSDP2 replicas (a sharding degree below the processes) are not seen."""

    def __init__(self, clock: WaitClock) -> None:
        self._clock = clock
        self._ready: Any = None

    def measure(self, model: nn.Module) -> None:
        """Begin with a model that is wrapped or sharded, before its first pass."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]  # a protocol in all but name
                module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]
        if isinstance(model, DistributedDataParallel):
            # The first parameter of a decoder is the last to get its gradient: what follows it is the exchange.
            first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._note)

    def ended(self) -> None:
        """After a backward pass that exchanged gradients."""
        if self._ready is not None:
            self._clock.add_since(self._ready, self._clock.standing)
            self._ready, self._clock.standing = None, ""
            self._clock.ended += 1

    def _note(self, _: Tensor) -> None:
        self._ready, self._clock.standing = self._clock.now(), "sum of the gradients"
