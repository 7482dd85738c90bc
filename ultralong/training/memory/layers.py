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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ultralong.attention.protocol import OutLse, SchemeContext
from ultralong.attention.scheme import Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.training.memory.activation_store import AttentionStore, LayerInputStore
from ultralong.training.memory.fused_ops import (
    add_linear,
    add_mlp,
    apply_rotary,
    linear_add,
    linears_for_backward,
    mlp_for_backward,
    rms_norm,
)
from ultralong.training.memory.tiled import Autocast, autocast_now, backward_tiles, tiles
from ultralong.training.parallel import unsharded

KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

Projecting = Callable[[Sequence[nn.Module], Tensor], Sequence[Tensor]]
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """One decoder layer, split at its attention.

    Attributes:
        module: transformers' layer, used with its own modules.
    """

    module: Any

    def pre_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        """Queries (B, t, H, D), keys and values (B, t, K, D) of x (B, t, d); cos and sin are (1 or B, t, D)."""
        q, k, v = self._projected(x, lambda projects, x: [project(x) for project in projects])
        q, k, dtype = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), autocast_now(x)
        return (q, k, v) if dtype is None else (q.to(dtype), k.to(dtype), v.to(dtype))

    def pre_attention_for_backward(self, x: Tensor) -> QKV:
        """`pre_attention` for its gradients, without the rotary embedding: their rotation is undone before this."""
        needed = (self._normalises_heads, self._normalises_heads, False)
        return self._projected(x, partial(linears_for_backward, needed=needed))

    def post_attention(self, x: Tensor, out: Tensor) -> None:
        """Turn the layer's input (B, t, d) into its output, in place, given the attention output (B, t, H, D)."""
        add_linear(x, self.module.self_attn.o_proj, out.flatten(2))
        add_mlp(x, self.module.mlp, rms_norm(self.module.post_attention_layernorm, x))

    def post_attention_for_backward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the output's sum, for their gradients."""
        x = linear_add(x, self.module.self_attn.o_proj, out.flatten(2))
        return x, mlp_for_backward(self.module.mlp, rms_norm(self.module.post_attention_layernorm, x))

    def _projected(self, x: Tensor, project: Projecting) -> QKV:
        """Heads of x before their rotary embedding; `project` computes the projections."""
        attention, x = self.module.self_attn, rms_norm(self.module.input_layernorm, x)
        found = project((attention.q_proj, attention.k_proj, attention.v_proj), x)
        q, k, v = (part.view(*x.shape[:-1], -1, attention.head_dim) for part in found)
        if self._normalises_heads:
            q, k = rms_norm(attention.q_norm, q), rms_norm(attention.k_norm, k)
        return q, k, v

    @property
    def _normalises_heads(self) -> bool:
        """Whether queries and keys are normalised, as in Qwen3."""
        return hasattr(self.module.self_attn, "q_norm")

    def pre_attention_parameters(self) -> list[Tensor]:
        """Parameters of `pre_attention`, as the layer holds them now (gathered, inside a sharded layer's pass)."""
        attention = self.module.self_attn
        modules = [self.module.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj]
        modules += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        return [parameter for module in modules for parameter in module.parameters()]

    def post_attention_parameters(self) -> list[Tensor]:
        """Parameters of `post_attention`."""
        modules = self.module.self_attn.o_proj, self.module.post_attention_layernorm, self.module.mlp
        return [parameter for module in modules for parameter in module.parameters()]

    def scheme_and_spec(self, context: SchemeContext, qkv: QKV) -> tuple[Scheme, AttentionSpec]:
        """How the context computes the layer's attention; Mistral has its sliding window in the config only."""
        attention = self.module.self_attn
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        return context.scheme_and_spec(*qkv, scale=attention.scaling, window=window)


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
        parameters = (*layer.pre_attention_parameters(), *layer.post_attention_parameters())
        return _Layer.apply(self, index, given, hidden_states, *parameters)

    def forward(self, index: int, given: ForwardInputs, x: Tensor) -> Tensor:
        """A layer's output (B, T, d) of its input; what its backward pass needs is stored."""
        layer = self.layers[index]
        pair = self._attend(layer, given, self._qkv(layer, given, x))
        y = self._post_attention(layer, x, pair[0])
        if given.save:
            self.inputs.save(index, x)
            self.outputs.save(index, *pair)
        return y

    def backward(self, index: int, given: ForwardInputs, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of a layer's input and of its parameters. Writes into `dy`."""
        layer, x = self.layers[index], self._input(index, given)
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
            dq, dk, dv, _ = scheme.backward(dout, *qkv, out, lse, spec)
        del qkv, out, lse, dout

        def rotated_back(place: slice) -> list[Tensor]:
            cos, sin = given.cos[:, place], -given.sin[:, place]
            return [apply_rotary(dq[:, place], cos, sin), apply_rotary(dk[:, place], cos, sin), dv[:, place]]

        project, parameters = layer.pre_attention_for_backward, layer.pre_attention_parameters()
        pre_grads = backward_tiles(project, [x], rotated_back, [dx], parameters, *tiling, add=True)
        return dx, *pre_grads, *post_grads

    def _input(self, index: int, given: ForwardInputs) -> Tensor:
        """A layer's input (B, T, d): stored, or recomputed from the nearest stored one before it.

        On the way the inputs of the layers between are recomputed as well, and stored until their turn, which is next.
        """
        if not self.inputs.has(index):
            start = self.inputs.nearest(index)
            x = self.inputs.get(start)
            for between in range(start, index):
                x = self._recompute(between, given, x)
                self.inputs.pin(between + 1, x)
        return self.inputs.pop(index)

    def _recompute(self, index: int, given: ForwardInputs, x: Tensor) -> Tensor:
        """A layer's output once more, in the middle of the backward pass of a layer above."""
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
            return scheme.forward(*qkv, spec)

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
    dropout = getattr(module.self_attn, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"memory.layer_tile is for layers without dropout, found attention_dropout={dropout}: set it to 0 in the "
            "model's config, or memory.layer_tile to 0."
        )
    return SplitLayer(module)
