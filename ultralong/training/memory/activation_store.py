"""Activation stores: attention outputs and layer inputs between the passes, on the device, offloaded, or not at all.

Legend: B batch, T tokens a process holds, d hidden size, H query heads, D head size.

The last layers, whose turn in the backward pass comes first, have theirs on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultralong.attention.protocol import OutLse
from ultralong.training.memory.offload import OffloadedTensor, Offloader


@dataclass
class AttentionStore:
    """Stores attention outputs over recomputed forward passes; an `ultralong.attention.AttentionOutputStore`.

    Attributes:
        layers: Number of layers.
        on_device: Outputs of this many layers, the last ones, stay on the device.
        on_host: Outputs of this many layers before those are offloaded; the first ones' are recomputed.
        offloader: Who copies them.
    """

    layers: int
    on_device: int
    on_host: int
    offloader: Offloader
    _stored: dict[int, tuple[Tensor | OffloadedTensor, Tensor]] = field(default_factory=dict, repr=False)

    def save(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Store a layer's out (B, T, H, D) where the plan says; lse, 1/64 of its size and less, stays on the device."""
        place = self.layers - 1 - layer  # 0 is the last layer
        if place < self.on_device:
            self.pin(layer, out, lse)
        elif place < self.on_device + self.on_host:
            self._stored[layer] = self.offloader.offload(out), lse

    def pin(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Store a layer's pair on the device, whatever the plan says."""
        self._stored[layer] = out, lse

    def pop(self, layer: int) -> OutLse | None:
        """A layer's pair, removed from the store; the output of the layer whose turn is next is prefetched."""
        found = self._stored.pop(layer, None)
        if found is None:
            return None
        out, lse = found
        out = self.offloader.pop(out) if isinstance(out, OffloadedTensor) else out
        self.prefetch(layer - 1)
        return out, lse

    def get(self, layer: int) -> OutLse | None:
        """A layer's pair, which stays stored; None when there is none."""
        found = self._stored.get(layer)
        if found is None:
            return None
        out, lse = found
        return self.offloader.get(out) if isinstance(out, OffloadedTensor) else out, lse

    def prefetch(self, layer: int) -> None:
        """Start bringing a layer's output back, if it is offloaded."""
        out = self._stored[layer][0] if layer in self._stored else None
        if isinstance(out, OffloadedTensor):
            self.offloader.prefetch(out)

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for out, _ in self._stored.values():
            if isinstance(out, OffloadedTensor):
                self.offloader.pop(out)
        self._stored.clear()


@dataclass
class LayerInputStore:
    """Stores the inputs of decoder layers with a custom backward pass.

    Attributes:
        every: The input of every N-th layer is stored, the first one's among them.
        on_host: Inputs of this many of those, the first ones, are offloaded.
        offloader: Who copies them.
    """

    every: int
    on_host: int
    offloader: Offloader
    _stored: dict[int, Tensor | OffloadedTensor] = field(default_factory=dict, repr=False)

    def save(self, layer: int, x: Tensor) -> None:
        """Store a layer's input (B, T, d) where the plan says, or not at all."""
        if layer % self.every:
            return
        self._stored[layer] = self.offloader.offload(x) if layer // self.every < self.on_host else x.detach()

    def pin(self, layer: int, x: Tensor) -> None:
        """Store a layer's input on the device, whatever the plan says."""
        self._stored[layer] = x

    def has(self, layer: int) -> bool:
        """Whether a layer's input is stored."""
        return layer in self._stored

    def nearest(self, layer: int) -> int:
        """The last layer before this one whose input is stored."""
        return max(stored for stored in self._stored if stored < layer)

    def get(self, layer: int) -> Tensor:
        """A layer's input, which stays stored."""
        x = self._stored[layer]
        return self.offloader.get(x) if isinstance(x, OffloadedTensor) else x

    def pop(self, layer: int) -> Tensor:
        """A layer's input, removed from the store; the stored one before it is prefetched."""
        x = self._stored.pop(layer)
        x = self.offloader.pop(x) if isinstance(x, OffloadedTensor) else x
        before = self._stored.get(layer - self.every if layer % self.every == 0 else layer - layer % self.every)
        if isinstance(before, OffloadedTensor):
            self.offloader.prefetch(before)
        return x

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for x in self._stored.values():
            if isinstance(x, OffloadedTensor):
                self.offloader.pop(x)
        self._stored.clear()


class CheckpointInputOffload:
    """Offloads the inputs of layers under transformers' own activation checkpointing.

    Attributes:
        count: Inputs of this many layers, the first ones, are offloaded.
        offloader: Who copies them.
    """

    def __init__(self, count: int, offloader: Offloader) -> None:
        self.count, self.offloader = count, offloader
        self._stored: dict[int, OffloadedTensor] = {}

    def checkpoint(self, index: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a checkpointed layer calls instead of itself: `function(*arguments)`, whose inside is recomputed."""
        if index >= self.count:
            return checkpoint(function, *arguments, use_reentrant=False)
        # What is saved inside the layer goes to the checkpoint's own hooks; to these come only the arguments.
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index), self._unpack):
            return checkpoint(function, *arguments, use_reentrant=False)

    def _pack(self, index: int, x: Tensor) -> Tensor | int:
        if index in self._stored or not x.is_floating_point() or x.dim() < 3:
            return x
        self._stored[index] = self.offloader.offload(x)
        return index

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        x = self.offloader.pop(self._stored.pop(packed))
        if packed - 1 in self._stored:
            self.offloader.prefetch(self._stored[packed - 1])
        return x

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for x in self._stored.values():
            self.offloader.pop(x)
        self._stored.clear()
