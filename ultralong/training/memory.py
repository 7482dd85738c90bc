"""What a layer leaves behind for the backward pass: kept on the device, moved to host memory, or computed again.

Legend: B batch, T tokens a process holds, d hidden size, H query heads, D head size.

Under activation checkpointing a layer keeps its input and computes the rest again. At a million tokens two things of a
layer are worth more than that rule gives them. The attention result, because computing it again is most of the step:
`Keeper` keeps it, on the device or in host memory, so that the second forward pass runs no attention. And the input,
because 32 of them fill a GPU: `HostInputs` moves it out and back. Copies run on a stream of their own beside the
computing; host buffers are pinned, made once and used again.

The layers whose turn in the backward pass comes first, the last ones, stay on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ultralong.attention.scheme import Pair
from ultralong.training.config import MemoryConfig, layers_meant
from ultralong.training.tiled import tile_layers


class HostPool:
    """Host buffers by shape and type, handed out and taken back; pinned where there is a GPU."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.bytes = 0

    def take(self, like: Tensor) -> Tensor:
        """A buffer of a tensor's shape and type, with any content."""
        free = self._free[like.shape, like.dtype]
        if free:
            return free.pop()
        self.bytes += like.numel() * like.element_size()
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)

    def give_back(self, buffer: Tensor) -> None:
        """Let a buffer be used again."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


@dataclass
class Moved:
    """A tensor in host memory, on its way there or on its way back."""

    host: Tensor
    device: torch.device
    out: torch.cuda.Event | None  # its copy to the host has ended
    back: Tensor | None = None
    ready: torch.cuda.Event | None = None


class Mover:
    """Copies tensors to host memory and back, beside the computing.

    Attributes:
        pool: The host buffers.
    """

    def __init__(self) -> None:
        self.pool = HostPool()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def away(self, x: Tensor) -> Moved:
        """Start moving a tensor to host memory; its device memory is free once nothing else holds it."""
        x = x.detach()
        host = self.pool.take(x)
        if not x.is_cuda:
            host.copy_(x)
            return Moved(host, x.device, None)
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
            x.record_stream(stream)
        return Moved(host, x.device, stream.record_event())

    def fetch(self, moved: Moved) -> None:
        """Start bringing a tensor back, if that has not begun."""
        if moved.back is not None:
            return
        if moved.device.type != "cuda":
            moved.back = moved.host.clone()
            return
        stream = self._stream(moved.device)
        stream.wait_event(moved.out)
        moved.back = torch.empty(moved.host.shape, dtype=moved.host.dtype, device=moved.device)
        stream.wait_stream(torch.cuda.current_stream(moved.device))  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            moved.back.copy_(moved.host, non_blocking=True)
        moved.ready = stream.record_event()

    def take(self, moved: Moved) -> Tensor:
        """The tensor, back on its device and ordered before what the current stream does next."""
        self.fetch(moved)
        back, moved.back = moved.back, None
        if moved.ready is not None:
            torch.cuda.current_stream(moved.device).wait_event(moved.ready)
            moved.ready.synchronize()  # the host buffer may be written again from here on
        self.pool.give_back(moved.host)
        return back


@dataclass
class Keeper:
    """Keeps attention results over recomputed forward passes (see `ultralong.attention.function.AttentionKeeper`).

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
            self._kept[layer] = out, lse
        elif place < self.on_device + self.on_host:
            self._kept[layer] = self.mover.away(out), lse

    def take(self, layer: int) -> Pair | None:
        """A layer's pair, given up; the result of the layer whose turn is next starts to come back."""
        found = self._kept.pop(layer, None)
        if found is None:
            return None
        out, lse = found
        out = self.mover.take(out) if isinstance(out, Moved) else out
        self.fetch_ahead(layer - 1)
        return out, lse

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


class HostInputs:
    """Moves the inputs of checkpointed layers to host memory while they wait for the backward pass.

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


class Memory:
    """The memory plan of a run, at work.

    Args:
        model: The causal language model, its layers checkpointed.
        config: The plan.

    Raises:
        ValueError: The plan moves or keeps something of layers that are not checkpointed, or the model has no list of
            layers.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig) -> None:
        self.mover = Mover()
        layers = decoder_layers(model)
        count = len(layers)
        on_device = layers_meant(config.attention_kept, count)
        on_host = min(layers_meant(config.attention_host, count), count - on_device)
        inputs = layers_meant(config.inputs_host, count)
        if (on_device or on_host or inputs) and not config.checkpoint_layers:
            raise ValueError(
                "attention_kept, attention_host and inputs_host say what stays of a checkpointed layer: set "
                "memory.checkpoint_layers to true (without it everything stays on the device)."
            )
        self.keeper = Keeper(count, on_device, on_host, self.mover) if on_device or on_host else None
        self._inputs = HostInputs(inputs, self.mover)
        if config.checkpoint_layers:
            for index, layer in enumerate(layers):
                if not isinstance(layer, GradientCheckpointingLayer):
                    raise ValueError(f"{type(layer).__name__} can't be checkpointed: set memory.checkpoint_layers to "
                                     "false, or train a model whose layers transformers can checkpoint.")
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(self._inputs.checkpointed, index)
        if config.mlp_tile:
            tile_layers(layers, config.mlp_tile)

    def clear(self) -> None:
        """Before a forward pass: forget what one without a backward pass left."""
        self._inputs.clear()
        if self.keeper is not None:
            self.keeper.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory taken for moved tensors."""
        return self.mover.pool.bytes


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a Hugging Face causal language model, in order.

    Raises:
        ValueError: Its decoder has no list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} keeps no list of layers in its decoder; it can't be sharded by layer")
    return list(layers)
