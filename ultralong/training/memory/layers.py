"""Decoder layers with a custom backward pass: tiled projections and feed-forward, attention outputs from a store.

Legend: B batch, T tokens a process holds, t tokens of a tile, d hidden size, H query heads, K kv heads, D head size.

A layer is split at its attention. `pre_attention` computes queries, keys and values from its input, `post_attention`
its output from input and attention output; both treat every token by itself, so both are computed in tiles, forward and
backward, and of a whole row only these exist at a time: x, q, k, v, out and their gradients. Between the passes a layer
leaves its attention output and its input in the activation stores (`activation_store`). Even the input may be left
out: with the attention output at hand, a layer's output, the next one's input, is matrix products alone.

For a million tokens on two GPUs this is the difference between 8 billion parameters fitting and not
(notebooks/results/design_measurements.md, "Decoder layers with a custom backward pass").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ultralong.attention.protocol import OutLse, SchemeContext
from ultralong.training.memory.activation_store import AttentionStore, LayerInputStore
from ultralong.training.memory.split_layer import QKV, SplitLayer
from ultralong.training.memory.tiled import Autocast, autocast_now, backward_tiles, tiles
from ultralong.training.parallel import unsharded

# Families of transformers whose decoder layers are of the kinds that `SplitLayer` knows.
FAMILIES = (
    "Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Gemma3", "Olmo2", "Olmo3", "Mixtral", "Qwen3Moe", "GptOss",
)  # fmt: skip
KNOWN = tuple(f"{family}DecoderLayer" for family in FAMILIES)


@dataclass(frozen=True, eq=False)
class ForwardInputs:
    """What all layers of one forward pass are given beside the hidden states.

    Attributes:
        context: The attention context of the row.
        cos: (1 or B, T, D).
        sin: (1 or B, T, D).
        autocast: The type that autocast computes in, None without.
        save: Whether a backward pass will follow.
    """

    context: SchemeContext
    cos: Tensor
    sin: Tensor
    autocast: Autocast
    save: bool


class CustomBackwardLayers:
    """The decoder layers of a model with a custom backward pass.

    Args:
        layers: transformers' layers, in order; their `forward` is replaced on the instances where an attention context
            is passed, and left alone where none is (generation).
        tile: Tokens of a tile.
        outputs: Stores attention outputs.
        inputs: Stores layer inputs.

    Raises:
        ValueError: Layers of a kind whose inside is not known here, or with attention dropout.
    """

    def __init__(
        self, layers: Sequence[nn.Module], tile: int, outputs: AttentionStore, inputs: LayerInputStore
    ) -> None:
        self.tile, self.outputs, self.inputs = tile, outputs, inputs
        self._given: dict[int, ForwardInputs] = {}  # of layers whose backward pass is to come
        self.layers = [_split(module) for module in layers]
        for index, layer in enumerate(self.layers):
            layer.module.forward = partial(self._called, index)

    def _called(
        self,
        index: int,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_context: SchemeContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What transformers calls in place of the layer's forward."""
        layer = self.layers[index]
        if attention_context is None:
            return type(layer.module).forward(
                layer.module,
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if (attention_mask is not None and getattr(attention_mask, "hides", True)) or past_key_values is not None:
            raise ValueError(
                "an attention_mask with hidden tokens and a key-value cache can't be used with an "
                "attention context: pass boundaries to make_attention_context, and use_cache=False"
            )
        assert position_embeddings is not None
        autocast, save = autocast_now(hidden_states), torch.is_grad_enabled()
        given = ForwardInputs(attention_context, *position_embeddings, autocast, save)
        parameters = (*layer.pre_attention_parameters(), *layer.post_attention_parameters(), *layer.sinks())
        return _Layer.apply(self, index, given, hidden_states, *parameters)

    def forward(self, index: int, given: ForwardInputs, x: Tensor) -> Tensor:
        """A layer's output (B, T, d) of its input; what its backward pass needs is stored."""
        layer = self.layers[index]
        pair = self._attend(layer, given, self._qkv(layer, given, x))
        y = self._post_attention(layer, x, pair[0])
        if given.save:
            self._given[index] = given
            self.inputs.save(index, x)
            self.outputs.save(index, *pair)
        return y

    def backward(self, index: int, given: ForwardInputs, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of a layer's input and of its parameters. Writes into `dy`."""
        layer, x = self.layers[index], self._input(index)
        pair, qkv = self.outputs.pop(index), None
        if pair is None:
            qkv = self._qkv(layer, given, x)
            pair = self._attend(layer, given, qkv)
        out, lse = pair
        del pair
        # dy serves as dx: it has come from the layer above or the final norm, which made it for this call alone, and
        # another (B, T, d) is what a stored attention output would have to go for.
        dx, dout = dy.contiguous(), torch.empty_like(out)
        tiling, finish = (self.tile, given.autocast), layer.post_attention_for_backward
        parameters = layer.post_attention_parameters()
        post_grads = backward_tiles(finish, [x, out], lambda place: 2 * [dx[:, place]], [dx, dout], parameters, *tiling)
        qkv = self._qkv(layer, given, x) if qkv is None else qkv
        scheme, spec = layer.scheme_and_spec(given.context, qkv)
        with torch.autocast(x.device.type, enabled=False):
            dq, dk, dv, of_sink = scheme.backward(dout, *qkv, out, lse, spec, layer.sink())
        del qkv, out, lse, dout

        def rotated_back(place: slice) -> list[Tensor]:
            cos, sin = given.cos[:, place], -given.sin[:, place]
            return [*layer.rotated(dq[:, place], dk[:, place], cos, sin), dv[:, place]]

        project, parameters = layer.pre_attention_for_backward, layer.pre_attention_parameters()
        pre_grads = backward_tiles(project, [x], rotated_back, [dx], parameters, *tiling, add=True)
        self._given.pop(index, None)
        return dx, *pre_grads, *post_grads, *(of_sink for _ in layer.sinks())

    def _input(self, index: int) -> Tensor:
        """A layer's input (B, T, d): stored, or recomputed from the nearest stored one before it.

        On the way the inputs of the layers between are recomputed as well, and stored until their turn, which is next.
        """
        if not self.inputs.has(index):
            start = self.inputs.nearest(index)
            x = self.inputs.get(start)
            for between in range(start, index):
                x = self._recompute(between, self._given[between], x)
                self.inputs.pin(between + 1, x)
        return self.inputs.pop(index)

    def _recompute(self, index: int, given: ForwardInputs, x: Tensor) -> Tensor:
        """A layer's output again, in the middle of the backward pass of a layer above."""
        layer = self.layers[index]
        with unsharded(layer.module), torch.autocast(x.device.type, given.autocast, given.autocast is not None):
            pair = self.outputs.get(index)
            if pair is None:
                pair = self._attend(layer, given, self._qkv(layer, given, x))
                self.outputs.pin(index, *pair)
            return self._post_attention(layer, x, pair[0])

    def _qkv(self, layer: SplitLayer, given: ForwardInputs, x: Tensor) -> QKV:
        """Queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input."""
        targets: list[Tensor] = []
        with torch.no_grad(), torch.autocast(x.device.type, given.autocast, given.autocast is not None):
            for place in tiles(x.shape[1], self.tile):
                parts = layer.pre_attention(x[:, place], given.cos[:, place], given.sin[:, place])
                targets = targets or [part.new_empty((x.shape[0], x.shape[1], *part.shape[2:])) for part in parts]
                for target, part in zip(targets, parts, strict=True):
                    target[:, place] = part
        q, k, v = targets
        return q, k, v

    def _attend(self, layer: SplitLayer, given: ForwardInputs, qkv: QKV) -> OutLse:
        scheme, spec = layer.scheme_and_spec(given.context, qkv)
        with torch.no_grad(), torch.autocast(qkv[0].device.type, enabled=False):
            return scheme.forward(*qkv, spec, layer.sink())

    def _post_attention(self, layer: SplitLayer, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output (B, T, d)."""
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.no_grad():
            for place in tiles(x.shape[1], self.tile):
                y[:, place] = x[:, place]
                layer.post_attention(y[:, place], out[:, place])
        return y


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: CustomBackwardLayers, index: int, given: ForwardInputs, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.layers, ctx.index, ctx.given = layers, index, given
        return layers.forward(index, given, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return None, None, None, *ctx.layers.backward(ctx.index, ctx.given, dy)


def _split(module: nn.Module) -> SplitLayer:
    name = type(module).__name__
    if name not in KNOWN or not type(module).__module__.startswith("transformers."):
        raise ValueError(
            f"memory.layer_tile computes the inside of {', '.join(KNOWN)} in tiles; {name} is not known "
            "to it: set memory.layer_tile to 0."
        )
    for place, name in ((module.self_attn, "attention_dropout"), (getattr(module, "mlp", None), "jitter_noise")):
        if found := getattr(place, name, 0.0):
            raise ValueError(
                f"memory.layer_tile is for layers without dropout, found {name}={found}: set it to 0 in the model's "
                "config, or memory.layer_tile to 0."
            )
    return SplitLayer(module)
