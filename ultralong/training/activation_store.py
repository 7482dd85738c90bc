"""What layers leave for the backward pass: attention results and inputs, on the device, in host memory, or nowhere.

Legend: B batch, T tokens a process holds, d hidden size, H query heads, D head size.

The layers whose turn in the backward pass comes first, the last ones, keep theirs on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultralong.attention.scheme import OutLse
from ultralong.training.offload import Moved, Mover


@dataclass
class Keeper:
    """Keeps attention results over recomputed forward passes (see `ultralong.attention.autograd.AttentionKeeper`).

    Attributes:
        layers: Number of layers.
        on_device: Results of this many layers, the last ones, stay on the device.
        on_host: Results of this many layers before those go to host memory; the first ones' are computed again.
        mover: Who moves them.
    """

    layers: int
    on_device: int
    on_host: int
    mover: Mover
    _kept: dict[int, tuple[Tensor | Moved, Tensor]] = field(default_factory=dict, repr=False)

    def put(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Keep a layer's out (B, T, H, D) where the plan says; lse, 1/64 of its size and less, stays on the device."""
        place = self.layers - 1 - layer  # 0 is the last layer
        if place < self.on_device:
            self.hold(layer, out, lse)
        elif place < self.on_device + self.on_host:
            self._kept[layer] = self.mover.away(out), lse

    def hold(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Keep a layer's pair on the device, whatever the plan says."""
        self._kept[layer] = out, lse

    def take(self, layer: int) -> OutLse | None:
        """A layer's pair, given up; the result of the layer whose turn is next starts to come back."""
        found = self._kept.pop(layer, None)
        if found is None:
            return None
        out, lse = found
        out = self.mover.take(out) if isinstance(out, Moved) else out
        self.fetch_ahead(layer - 1)
        return out, lse

    def look(self, layer: int) -> OutLse | None:
        """A layer's pair, which stays kept; None when there is none."""
        found = self._kept.get(layer)
        if found is None:
            return None
        out, lse = found
        return self.mover.look(out) if isinstance(out, Moved) else out, lse

    def fetch_ahead(self, layer: int) -> None:
        """Start bringing a layer's result back, if it is on the host."""
        if layer in self._kept and isinstance(self._kept[layer][0], Moved):
            self.mover.fetch(self._kept[layer][0])

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for out, _ in self._kept.values():
            if isinstance(out, Moved):
                self.mover.take(out)
        self._kept.clear()


@dataclass
class Inputs:
    """Keeps the inputs of layers whose backward pass is written out.

    Attributes:
        every: The input of every so-manieth layer is kept, the first one's among them.
        on_host: Inputs of this many of those, the first ones, go to host memory.
        mover: Who moves them.
    """

    every: int
    on_host: int
    mover: Mover
    _kept: dict[int, Tensor | Moved] = field(default_factory=dict, repr=False)

    def put(self, layer: int, x: Tensor) -> None:
        """Keep a layer's input (B, T, d) where the plan says, or not at all."""
        if layer % self.every:
            return
        self._kept[layer] = self.mover.away(x) if layer // self.every < self.on_host else x.detach()

    def hold(self, layer: int, x: Tensor) -> None:
        """Keep a layer's input on the device, whatever the plan says."""
        self._kept[layer] = x

    def has(self, layer: int) -> bool:
        """Whether a layer's input is kept."""
        return layer in self._kept

    def nearest(self, layer: int) -> int:
        """The last layer before this one whose input is kept."""
        return max(kept for kept in self._kept if kept < layer)

    def look(self, layer: int) -> Tensor:
        """A layer's input, which stays kept."""
        x = self._kept[layer]
        return self.mover.look(x) if isinstance(x, Moved) else x

    def take(self, layer: int) -> Tensor:
        """A layer's input, given up; the kept one before it starts to come back."""
        x = self._kept.pop(layer)
        x = self.mover.take(x) if isinstance(x, Moved) else x
        before = self._kept.get(layer - self.every if layer % self.every == 0 else layer - layer % self.every)
        if isinstance(before, Moved):
            self.mover.fetch(before)
        return x

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for x in self._kept.values():
            if isinstance(x, Moved):
                self.mover.take(x)
        self._kept.clear()


class CheckpointedInputs:
    """Moves the inputs of layers under transformers' own checkpointing to host memory.

    Attributes:
        count: Inputs of this many layers, the first ones, are moved.
        mover: Who moves them.
    """

    def __init__(self, count: int, mover: Mover) -> None:
        self.count, self.mover = count, mover
        self._waiting: dict[int, Moved] = {}

    def checkpointed(self, index: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a checkpointed layer calls instead of itself: `function(*arguments)`, whose inside is computed again."""
        if index >= self.count:
            return checkpoint(function, *arguments, use_reentrant=False)
        # What is saved inside the layer goes to the checkpoint's own hooks; to these come only the arguments.
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index), self._unpack):
            return checkpoint(function, *arguments, use_reentrant=False)

    def _pack(self, index: int, x: Tensor) -> Tensor | int:
        if index in self._waiting or not x.is_floating_point() or x.dim() < 3:
            return x
        self._waiting[index] = self.mover.away(x)
        return index

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        x = self.mover.take(self._waiting.pop(packed))
        if packed - 1 in self._waiting:
            self.mover.fetch(self._waiting[packed - 1])
        return x

    def clear(self) -> None:
        """Forget what a forward pass without a backward pass left."""
        for moved in self._waiting.values():
            self.mover.take(moved)
        self._waiting.clear()
