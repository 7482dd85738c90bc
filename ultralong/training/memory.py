"""The memory plan of a run, at work.

Under activation checkpointing a layer keeps its input and computes the rest again. At a million tokens two things of a
layer are worth more than that rule gives them. The attention result, because computing it again is most of the step:
`Keeper` keeps it, on the device or in host memory, so that the second forward pass runs no attention. And the input,
because 32 of them fill a GPU: inputs go to host memory, or only every so-manieth is kept and the others are made again
from attention results. With `layer_tile` the layers' own backward passes are written out (`ultralong.training.layers`),
which bounds what one layer holds while it is its turn.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ultralong.training.activation_store import CheckpointedInputs, Inputs, Keeper
from ultralong.training.config import MemoryConfig, layers_meant
from ultralong.training.layers import WrittenLayers
from ultralong.training.offload import Mover
from ultralong.training.tiled import tile_module


class Memory:
    """What waits where between the passes.

    Args:
        model: The causal language model; its layers are told how to run.
        config: The plan.

    Attributes:
        mover: Who moves tensors to host memory.
        keeper: Who keeps attention results; None where each is computed again.

    Raises:
        ValueError: The plan moves or keeps something of layers that are not checkpointed, the model has no list of
            layers, or its layers are of a kind that the plan's tiles are not for.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig) -> None:
        self.mover, self._config = Mover(), config
        layers = decoder_layers(model)
        count = len(layers)
        on_device = layers_meant(config.attention_outputs_on_gpu, count)
        on_host = min(layers_meant(config.attention_outputs_offloaded, count), count - on_device)
        moved = layers_meant(config.layer_inputs_offloaded, -(-count // config.checkpoint_every))
        keeper = Keeper(count, on_device, on_host, self.mover)
        self.keeper = keeper if on_device or on_host or config.layer_tile else None
        self._inputs: Inputs | CheckpointedInputs
        if config.layer_tile:
            self._inputs = Inputs(config.checkpoint_every, moved, self.mover)
            WrittenLayers(layers, config.layer_tile, keeper, self._inputs)
            tile_module(model.get_decoder().norm, config.layer_tile)
        else:
            self._inputs = CheckpointedInputs(moved, self.mover)
            if config.activation_checkpointing:
                _checkpoint(layers, self._inputs)
        self._waiting = {"out": on_host, "input": moved}
        text = model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._heads, self._hidden = (text.num_attention_heads, size), text.hidden_size

    def reserve(self, batch: int, tokens: int, dtype: torch.dtype, stream: torch.dtype, device: torch.device) -> None:
        """Make the host buffers that a step will use, so that no step waits for them; those there are stay.

        Args:
            batch: Rows at a time, B.
            tokens: Tokens of a row on this process, T.
            dtype: What the layers compute in.
            stream: Type of the hidden states between layers.
            device: Where the model is.
        """
        if self.mover.pool.bytes:
            return
        for _ in range(self._waiting["out"]):
            self.mover.pool.reserve((batch, tokens, *self._heads), dtype, device)
        for _ in range(self._waiting["input"]):
            self.mover.pool.reserve((batch, tokens, self._hidden), stream, device)

    def release(self) -> None:
        """Give the host buffers back, before something else needs the host's memory, such as a checkpoint."""
        self.clear()
        self.mover.pool.release()

    def clear(self) -> None:
        """Before a forward pass: forget what one without a backward pass left."""
        self._inputs.clear()
        if self.keeper is not None:
            self.keeper.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory taken for moved tensors."""
        return self.mover.pool.bytes


def _checkpoint(layers: list[nn.Module], inputs: CheckpointedInputs) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"{type(layer).__name__} can't be checkpointed: set memory.activation_checkpointing to false, or "
                "train a model whose layers transformers can checkpoint."
            )
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(inputs.checkpointed, index)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a Hugging Face causal language model, in order.

    Raises:
        ValueError: Its decoder has no list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} keeps no list of layers in its decoder; it can't be sharded by layer")
    return list(layers)
