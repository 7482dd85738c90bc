"""A decoder layer with its backward pass written out: what waits, what is computed again, and in which order.

Legend: B batch, T tokens a process holds, t tokens of a tile, d hidden size, H query heads, K kv heads, D head size.

A layer is cut at its attention. `before` makes queries, keys and values of its input, `after` makes its output of input
and attention result; both treat every token by itself, so both are computed in tiles, forward and backward, and of a
whole row only these exist at a time: x, q, k, v, out and their gradients. Between the passes a layer leaves its
attention result and its input (see `ultralong.training.memory`). Even the input may be left out: with the attention
result at hand, a layer's output, the next one's input, is matrix products alone.

For a million tokens on two GPUs this is the difference between 8 billion parameters fitting and not. Beside the inputs
that wait, transformers' layer under checkpointing would hold 130 GiB there while its backward pass runs, this one 57,
and 38 with Ulysses' heads in eight stages (Llama-3.1-8B's shape, 524,288 tokens a process, by
`ultralong.planner.trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ultralong.attention.scheme import OutLse, Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.training.activation_store import Inputs, Keeper
from ultralong.training.fused_ops import add_product, added, normed, products, rotated
from ultralong.training.swiglu import add_fed_forward, fed_forward_again
from ultralong.training.tiled import Autocast, autocast_now, backward_tiles, tiles

KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

Projecting = Callable[[Sequence[nn.Module], Tensor], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer, cut at its attention.

    Attributes:
        layer: transformers' layer, used with its own modules.
    """

    layer: nn.Module

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, t, H, D), keys and values (B, t, K, D) of x (B, t, d); cos and sin are (1 or B, t, D)."""
        q, k, v = self._projected(x, lambda projects, x: [project(x) for project in projects])
        q, k, narrow = rotated(q, cos, sin), rotated(k, cos, sin), autocast_now(x)
        return (q, k, v) if narrow is None else (q.to(narrow), k.to(narrow), v.to(narrow))

    def before_again(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`before` for its gradients, and without the rotation: those are turned back before they come here."""
        seen = (self._heads_are_normed, self._heads_are_normed, False)
        return self._projected(x, partial(products, seen=seen))

    def after(self, x: Tensor, out: Tensor) -> None:
        """Add to the layer's input (B, t, d) what makes it the output, given the attention result (B, t, H, D)."""
        add_product(x, self.layer.self_attn.o_proj, out.flatten(2))
        add_fed_forward(x, self.layer.mlp, normed(self.layer.post_attention_layernorm, x))

    def after_again(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the output's sum, for their gradients."""
        x = added(x, self.layer.self_attn.o_proj, out.flatten(2))
        return x, fed_forward_again(self.layer.mlp, normed(self.layer.post_attention_layernorm, x))

    def _projected(self, x: Tensor, project: Projecting) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of x before their rotation; its projections are computed the way they are asked for."""
        attention, x = self.layer.self_attn, normed(self.layer.input_layernorm, x)
        found = project((attention.q_proj, attention.k_proj, attention.v_proj), x)
        q, k, v = (part.view(*x.shape[:-1], -1, attention.head_dim) for part in found)
        if self._heads_are_normed:
            q, k = normed(attention.q_norm, q), normed(attention.k_norm, k)
        return q, k, v

    @property
    def _heads_are_normed(self) -> bool:
        """Qwen3's queries and keys."""
        return hasattr(self.layer.self_attn, "q_norm")

    def before_parameters(self) -> list[Tensor]:
        """What `before` reads, as the layer holds it now (gathered, inside a sharded layer's pass)."""
        attention = self.layer.self_attn
        modules = [self.layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj]
        modules += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        return [parameter for module in modules for parameter in module.parameters()]

    def after_parameters(self) -> list[Tensor]:
        """What `after` reads."""
        modules = self.layer.self_attn.o_proj, self.layer.post_attention_layernorm, self.layer.mlp
        return [parameter for module in modules for parameter in module.parameters()]

    @property
    def window(self) -> int | None:
        """The layer's sliding window in tokens; Mistral has it in the config only."""
        attention = self.layer.self_attn
        return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


@dataclass(frozen=True, eq=False)
class Call:
    """What all layers of one forward pass are given beside the hidden states.

    Attributes:
        context: `ultralong.attention.AttentionContext` of the row.
        cos: (1 or B, T, D).
        sin: (1 or B, T, D).
        autocast: The type that autocast computes in, None without.
        keep: Whether a backward pass will follow.
    """

    context: Any
    cos: Tensor
    sin: Tensor
    autocast: Autocast
    keep: bool


class WrittenLayers:
    """The decoder layers of a model with their backward passes written out.

    Args:
        layers: transformers' layers, in order; their `forward` is replaced on the instances where an attention context
            is passed, and left alone where none is (generation).
        tile: Tokens of a tile.
        keeper: Keeps attention results.
        inputs: Keeps layer inputs.

    Raises:
        ValueError: Layers of a kind whose inside is not known here, or with attention dropout.
    """

    def __init__(self, layers: Sequence[nn.Module], tile: int, keeper: Keeper, inputs: Inputs) -> None:
        self.tile, self.keeper, self.inputs = tile, keeper, inputs
        self.cuts = [_cut(layer) for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = partial(self._called, index)

    def _called(
        self,
        index: int,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_context: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """What transformers calls in place of the layer's forward."""
        cut = self.cuts[index]
        if attention_context is None:
            return type(cut.layer).forward(
                cut.layer,
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden = attention_mask is not None and getattr(attention_mask, "hides", True)
        if hidden or past_key_values is not None:
            raise ValueError(
                "an attention_mask with hidden tokens and a key-value cache can't be used with an "
                "attention context: pass boundaries to make_attention_context, and use_cache=False"
            )
        call = Call(attention_context, *position_embeddings, autocast_now(hidden_states), torch.is_grad_enabled())
        return _Layer.apply(self, index, call, hidden_states, *cut.before_parameters(), *cut.after_parameters())

    def forward(self, index: int, call: Call, x: Tensor) -> Tensor:
        """A layer's output (B, T, d) of its input; what its backward pass needs is kept."""
        cut = self.cuts[index]
        pair = self._attend(cut, call, self._project(cut, call, x))
        y = self._finish(cut, x, pair[0])
        if call.keep:
            self.inputs.put(index, x)
            self.keeper.put(index, *pair)
        return y

    def backward(self, index: int, call: Call, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of a layer's input and of its parameters. Writes into `dy`.

        `dy` has come from the layer above or the final norm, which made it for this call alone; another (B, T, d) is
        what a kept attention result would have to go for.
        """
        cut, x = self.cuts[index], self._input(index, call)
        pair, qkv = self.keeper.take(index), None
        if pair is None:
            qkv = self._project(cut, call, x)
            pair = self._attend(cut, call, qkv)
        out, lse = pair
        del pair
        dx, dout = dy.contiguous(), torch.empty_like(out)
        of_after = backward_tiles(
            cut.after_again,
            [x, out],
            lambda place: 2 * [dx[:, place]],
            [dx, dout],
            cut.after_parameters(),
            self.tile,
            call.autocast,
        )
        qkv = self._project(cut, call, x) if qkv is None else qkv
        scheme, spec = self._rule(cut, call, qkv)
        with torch.autocast(x.device.type, enabled=False):
            dq, dk, dv, _ = scheme.backward(dout, *qkv, out, lse, spec)
        del qkv, out, lse, dout

        def turned_back(place: slice) -> list[Tensor]:
            cos, sin = call.cos[:, place], -call.sin[:, place]
            return [rotated(dq[:, place], cos, sin), rotated(dk[:, place], cos, sin), dv[:, place]]

        of_before = backward_tiles(
            cut.before_again, [x], turned_back, [dx], cut.before_parameters(), self.tile, call.autocast, add=True
        )
        return dx, *of_before, *of_after

    def _input(self, index: int, call: Call) -> Tensor:
        """A layer's input (B, T, d): kept, or made again from the nearest kept one before it.

        On the way the inputs of the layers between are made as well, and kept until their turn, which is next.
        """
        if not self.inputs.has(index):
            start = self.inputs.nearest(index)
            x = self.inputs.look(start)
            for between in range(start, index):
                x = self._again(between, call, x)
                self.inputs.hold(between + 1, x)
        return self.inputs.take(index)

    def _again(self, index: int, call: Call, x: Tensor) -> Tensor:
        """A layer's output once more, in the middle of the backward pass of a layer above."""
        cut = self.cuts[index]
        with _gathered(cut.layer), torch.autocast(x.device.type, call.autocast, call.autocast is not None):
            pair = self.keeper.look(index)
            if pair is None:
                pair = self._attend(cut, call, self._project(cut, call, x))
                self.keeper.hold(index, *pair)
            return self._finish(cut, x, pair[0])

    def _project(self, cut: Cut, call: Call, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input."""
        whole: list[Tensor] = []
        with torch.no_grad(), torch.autocast(x.device.type, call.autocast, call.autocast is not None):
            for place in tiles(x.shape[1], self.tile):
                parts = cut.before(x[:, place], call.cos[:, place], call.sin[:, place])
                whole = whole or [part.new_empty((x.shape[0], x.shape[1], *part.shape[2:])) for part in parts]
                for target, part in zip(whole, parts, strict=True):
                    target[:, place] = part
        return tuple(whole)

    def _rule(self, cut: Cut, call: Call, qkv: tuple[Tensor, ...]) -> tuple[Scheme, AttentionSpec]:
        return call.context.scheme_and_spec(*qkv, scale=cut.layer.self_attn.scaling, window=cut.window)

    def _attend(self, cut: Cut, call: Call, qkv: tuple[Tensor, ...]) -> OutLse:
        scheme, spec = self._rule(cut, call, qkv)
        with torch.no_grad(), torch.autocast(qkv[0].device.type, enabled=False):
            return scheme.forward(*qkv, spec)

    def _finish(self, cut: Cut, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output (B, T, d)."""
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.no_grad():
            for place in tiles(x.shape[1], self.tile):
                y[:, place] = x[:, place]
                cut.after(y[:, place], out[:, place])
        return y


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: WrittenLayers, index: int, call: Call, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layers, ctx.index, ctx.call = layers, index, call
        return layers.forward(index, call, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return None, None, None, *ctx.layers.backward(ctx.index, ctx.call, dy)


def _cut(layer: nn.Module) -> Cut:
    name = type(layer).__name__
    if name not in KNOWN or not type(layer).__module__.startswith("transformers."):
        raise ValueError(
            f"memory.layer_tile computes the inside of {', '.join(KNOWN)} in tiles; {name} is not known "
            "to it: set memory.layer_tile to 0."
        )
    attention = layer.self_attn
    if getattr(attention, "attention_dropout", 0.0):
        raise ValueError(
            "memory.layer_tile is for layers without dropout, found attention_dropout="
            f"{attention.attention_dropout}: set it to 0 in the model's config, or memory.layer_tile to "
            "0."
        )
    return Cut(layer)


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[None]:
    """A sharded layer's parameters in full, outside of its own turn."""
    sharded = isinstance(layer, FSDPModule)
    if sharded:
        layer.unshard()
    try:
        yield
    finally:
        if sharded:
            layer.reshard()
