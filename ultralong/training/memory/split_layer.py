"""One decoder layer of transformers, split at its attention: what is computed before it and after it, token by token.

Legend: B batch, t tokens of a tile, d hidden size, H query heads, K kv heads, D head size.

The families differ in where they normalise and in what follows attention:

| | before attention | queries and keys | after attention | before and after the feed-forward |
|---|---|---|---|---|
| Llama, Mistral, Ministral, Qwen2, Mixtral, gpt-oss | norm | - | - | norm, - |
| Qwen3, Qwen3-MoE | norm | norm of each head | - | norm, - |
| Gemma 3 | norm | norm of each head | norm | norm, norm |
| OLMo 2, OLMo 3 | - | norm of all heads together | norm | -, norm |

The feed-forward may be a mixture of experts: which experts a token takes depends on that token alone, and both passes
compute it by the same operations on the same tiles, so that they agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ultralong.attention.protocol import SchemeContext
from ultralong.attention.scheme import Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.training.memory.fused_ops import (
    add_linear,
    add_mlp,
    apply_rotary,
    linear_add,
    linears_for_backward,
    mlp_for_backward,
    mlp_output,
    rms_norm,
)
from ultralong.training.memory.tiled import autocast_now

Projecting = Callable[[Sequence[nn.Module], Tensor], Sequence[Tensor]]
QKV = tuple[Tensor, Tensor, Tensor]
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


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
        (q, k), dtype = self.rotated(q, k, cos, sin), autocast_now(x)
        return (q, k, v) if dtype is None else (q.to(dtype), k.to(dtype), v.to(dtype))

    def pre_attention_for_backward(self, x: Tensor) -> QKV:
        """`pre_attention` for its gradients, without the rotary embedding: their rotation is undone before this."""
        normalised = hasattr(self.module.self_attn, "q_norm")
        return self._projected(x, partial(linears_for_backward, needed=(normalised, normalised, False)))

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, in their own type; gpt-oss gives each angle once, OLMo angles in float32."""
        if cos.shape[-1] < q.shape[-1]:
            cos, sin = (torch.cat([y, y], -1) for y in (cos, sin))
        return apply_rotary(q, cos, sin).to(q.dtype), apply_rotary(k, cos, sin).to(k.dtype)

    def post_attention(self, x: Tensor, out: Tensor) -> None:
        """Turn the layer's input (B, t, d) into its output, in place, given the attention output (B, t, H, D)."""
        layer, out = self.module, out.flatten(2)
        if not self._normalises_results:
            add_linear(x, layer.self_attn.o_proj, out)
            add_mlp(x, layer.mlp, rms_norm(layer.post_attention_layernorm, x))
            return
        x += rms_norm(layer.post_attention_layernorm, layer.self_attn.o_proj(out))
        x += self._normalised_feed_forward(x)

    def post_attention_for_backward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the output's sum, for their gradients."""
        layer, out = self.module, out.flatten(2)
        if not self._normalises_results:
            x = linear_add(x, layer.self_attn.o_proj, out)
            return x, mlp_for_backward(layer.mlp, rms_norm(layer.post_attention_layernorm, x))
        x = x + rms_norm(layer.post_attention_layernorm, layer.self_attn.o_proj(out))
        return x, self._normalised_feed_forward(x)

    @property
    def _normalises_results(self) -> bool:
        """Whether what attention and the feed-forward give is normalised before it is added."""
        return hasattr(self.module, "post_feedforward_layernorm")

    def _normalised_feed_forward(self, x: Tensor) -> Tensor:
        y = rms_norm(self.module.pre_feedforward_layernorm, x) if hasattr(self.module, NORMS[2]) else x
        return rms_norm(self.module.post_feedforward_layernorm, mlp_output(self.module.mlp, y))

    def _projected(self, x: Tensor, project: Projecting) -> QKV:
        """Heads of x before their rotary embedding; `project` computes the projections."""
        attention = self.module.self_attn
        x = rms_norm(self.module.input_layernorm, x) if hasattr(self.module, NORMS[0]) else x
        q, k, v = project((attention.q_proj, attention.k_proj, attention.v_proj), x)
        together = hasattr(attention, "q_norm") and attention.q_norm.weight.numel() != attention.head_dim
        if together:
            q, k = rms_norm(attention.q_norm, q), rms_norm(attention.k_norm, k)
        q, k, v = (part.view(*x.shape[:-1], -1, attention.head_dim) for part in (q, k, v))
        if hasattr(attention, "q_norm") and not together:
            q, k = rms_norm(attention.q_norm, q), rms_norm(attention.k_norm, k)
        return q, k, v

    def pre_attention_parameters(self) -> list[Tensor]:
        """Parameters of `pre_attention`, as the layer holds them now (gathered, inside a sharded layer's pass)."""
        attention = self.module.self_attn
        modules = [getattr(self.module, name) for name in NORMS[:1] if hasattr(self.module, name)]
        modules += [attention.q_proj, attention.k_proj, attention.v_proj]
        modules += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        return [parameter for module in modules for parameter in module.parameters()]

    def post_attention_parameters(self) -> list[Tensor]:
        """Parameters of `post_attention`."""
        modules = [self.module.self_attn.o_proj, self.module.mlp]
        modules += [getattr(self.module, name) for name in NORMS[1:] if hasattr(self.module, name)]
        return [parameter for module in modules for parameter in module.parameters()]

    def sink(self) -> Tensor | None:
        """Logits (H,) of the attention sink, where the layer has one (gpt-oss)."""
        return getattr(self.module.self_attn, "sinks", None)

    def sinks(self) -> list[Tensor]:
        """`sink` as a list of parameters."""
        sink = self.sink()
        return [] if sink is None else [sink]

    def scheme_and_spec(self, context: SchemeContext, qkv: QKV) -> tuple[Scheme, AttentionSpec]:
        """How the context computes the layer's attention; Mistral has its sliding window in the config only."""
        attention = self.module.self_attn
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        return context.scheme_and_spec(*qkv, scale=attention.scaling, window=window)
