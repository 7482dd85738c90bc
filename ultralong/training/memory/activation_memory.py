"""Activation memory of a run: what is stored between the passes, where, and what is recomputed.

Under activation checkpointing a layer keeps its input and recomputes the rest. At a million tokens two activations of a
layer are worth more than that rule gives them. The attention output, because recomputing it is most of the step:
`AttentionStore` stores it, on the device or offloaded, so that the second forward pass runs no attention. And the
input, because 32 of them fill a GPU: inputs are offloaded, or only every N-th is stored and the others are recomputed
from it and the attention outputs. With `layer_tile` the layers have a custom backward pass
(`ultralong.training.memory.layers`), which bounds what one layer holds while it is its turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ultralong.checkpoints.config import head_size
from ultralong.training.config import MemoryConfig
from ultralong.training.memory.activation_store import AttentionStore, CheckpointInputOffload, LayerInputStore
from ultralong.training.memory.layers import FAMILIES, KNOWN, CustomBackwardLayers
from ultralong.training.memory.offload import Offloader
from ultralong.training.memory.tiled import tile_module


def check_tiled_layers(config: PreTrainedConfig) -> None:
    """Refuse a model whose layers `memory.layer_tile` is not for, by its config alone.

    Raises:
        ValueError: Its layers are of another kind, or have dropout.
    """
    text = config.get_text_config()
    if text.model_type.removesuffix("_text").replace("_", "") not in [family.lower() for family in FAMILIES]:
        raise ValueError(
            f"memory.layer_tile computes the inside of {', '.join(KNOWN)} in tiles; layers of {text.model_type} "
            "are not known to it: set memory.layer_tile to 0."
        )
    if dropout := getattr(text, "attention_dropout", 0.0):
        raise ValueError(
            f"memory.layer_tile is for layers without dropout, found attention_dropout={dropout}: set it to 0 in the "
            "model's config, or memory.layer_tile to 0."
        )


def layers_meant(asked: int, layers: int) -> int:
    """What a number of layers in `MemoryConfig` means for a model: -1 is all, and more than there are is all too."""
    return layers if asked < 0 else min(asked, layers)


class ActivationMemory:
    """The activation stores of a model, as a memory plan says.

    Args:
        model: The causal language model; its layers are told how to run.
        config: The plan.

    Attributes:
        offloader: Who copies tensors to host memory.
        attention_store: Stores attention outputs; None where each is recomputed.

    Raises:
        ValueError: The plan offloads or stores something of layers that are not checkpointed, the model has no list of
            layers, or its layers are of a kind that the plan's tiles are not for.
    """

    def __init__(self, model: PreTrainedModel, config: MemoryConfig) -> None:
        self.offloader, self._config = Offloader(), config
        layers = decoder_layers(model)
        count = len(layers)
        on_device = layers_meant(config.attention_outputs_on_gpu, count)
        on_host = min(layers_meant(config.attention_outputs_offloaded, count), count - on_device)
        offloaded = layers_meant(config.layer_inputs_offloaded, -(-count // config.checkpoint_every))
        store = AttentionStore(count, on_device, on_host, self.offloader)
        self.attention_store = store if on_device or on_host or config.layer_tile else None
        self.input_store: LayerInputStore | CheckpointInputOffload
        if config.layer_tile:
            self.input_store = LayerInputStore(config.checkpoint_every, offloaded, self.offloader)
            CustomBackwardLayers(layers, config.layer_tile, store, self.input_store)
            tile_module(model.get_decoder().norm, config.layer_tile)
        else:
            self.input_store = CheckpointInputOffload(offloaded, self.offloader)
            if config.activation_checkpointing:
                _checkpoint(layers, self.input_store)
        self._offloaded = {"out": on_host, "input": offloaded}
        text = model.config.get_text_config()
        self._heads, self._hidden = (text.num_attention_heads, head_size(text)), text.hidden_size

    def reserve(self, batch: int, tokens: int, dtype: torch.dtype, residual: torch.dtype, device: torch.device) -> None:
        """Allocate the host buffers that a step will use, so that no step waits for them; existing ones stay.

        Args:
            batch: Rows at a time, B.
            tokens: Tokens of a row on this process, T.
            dtype: What the layers compute in.
            residual: Type of the hidden states between layers.
            device: Where the model is.
        """
        if self.offloader.pool.bytes:
            return
        for _ in range(self._offloaded["out"]):
            self.offloader.pool.reserve((batch, tokens, *self._heads), dtype, device)
        for _ in range(self._offloaded["input"]):
            self.offloader.pool.reserve((batch, tokens, self._hidden), residual, device)

    def release(self) -> None:
        """Free the host buffers, before something else needs the host's memory, such as a checkpoint."""
        self.clear()
        self.offloader.pool.release()

    def clear(self) -> None:
        """Before a forward pass: forget what one without a backward pass left."""
        self.input_store.clear()
        if self.attention_store is not None:
            self.attention_store.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory taken for offloaded tensors."""
        return self.offloader.pool.bytes


def _checkpoint(layers: list[nn.Module], inputs: CheckpointInputOffload) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"{type(layer).__name__} can't be checkpointed: set memory.activation_checkpointing to false, or "
                "train a model whose layers transformers can checkpoint."
            )
        layer.gradient_checkpointing = True
        recomputed: Any = layer
        recomputed._gradient_checkpointing_func = partial(inputs.checkpoint, index)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a Hugging Face causal language model, in order.

    Raises:
        ValueError: Its decoder has no list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} keeps no list of layers in its decoder; it can't be sharded by layer")
    return list(layers)
