"""Attention and head loss that allocate what the real ones do and compute nothing.

The real ones look at values (which tokens have targets) or run kernels that no fake tensor can; memory and work depend
on neither.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, V vocabulary, N = B x T, m tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "ultralong-plan"


@dataclass(frozen=True)
class Attention:
    """A scheme that allocates what Ulysses does over several ranks, or one kernel on one rank.

    Attributes:
        stages: Head chunks that tokens are traded for; 0 where nothing is exchanged.
    """

    stages: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Any = None, sink: Any = None) -> tuple[Tensor, Tensor]:
        """Out (B, T, H, D) and lse (B, T, H)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if self.stages:
            held = self._exchanged(q, k, v)
            held += [self._part(out) for _ in range(2 if self.stages == 1 else 4)]  # of two stages on their way
            del held
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Any = None,
                 sink: Any = None) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v."""
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        held = self._exchanged(q, k, v, out, dout)
        # Kernels sum gradients over blocks in float32 and hold out * dout summed over D.
        sums = [self._part(x, torch.float32) for x in (q, k, v)]
        delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)  # (B, T, H)
        if self.stages:
            held += [self._part(x) for x in grads for _ in range(2 if self.stages == 1 else 4)]
        del held, sums, delta
        return (*grads, None)

    def _exchanged(self, *tensors: Tensor) -> list[Tensor]:
        """What has arrived for a stage; one stage's has left before, of several the next one's is under way."""
        if not self.stages:
            return []
        arrived = [self._part(x) for _ in range(2) for x in tensors]
        return arrived[: len(tensors)] if self.stages == 1 else arrived + [self._part(x) for x in tensors]

    def _part(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of a stage's share of x's heads (B, T, H, D)."""
        shape = (*x.shape[:2], -(-x.shape[2] // max(1, self.stages)), x.shape[3])
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


@dataclass(frozen=True)
class Context:
    """What the trainer's own layers ask of an attention context."""

    stages: int

    def call(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Attention, None]:
        """The scheme, and no rule."""
        return Attention(self.stages), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scheme: Attention) -> Tensor:
        out, lse = scheme.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scheme = scheme
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.scheme.backward(dout, *ctx.saved_tensors)


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              attention_context: Context, **kwargs: Any) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (B, H, T, D) in, (B, T, H, D) out."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    scheme = Attention(attention_context.stages)
    return _Attention.apply(*(x.transpose(1, 2) for x in (query, key, value)), scheme), None


class _HeadLoss(torch.autograd.Function):
    """`ultralong.training.loss` with every token a target: one tile's buffers, all of the gradients.

    As on a GPU, where the log-sum-exp is one pass; without torch's compiler it holds one more tile of logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tile: int, compute: torch.dtype) -> Tensor:
        head = weight.to(compute)  # (V, d)
        losses = torch.zeros(hidden.shape[:1], device=hidden.device)  # (N,)
        d_hidden = torch.zeros_like(hidden)  # (N, d)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)  # (V, d)
        part = hidden[: min(tile, len(hidden))].to(compute)  # (m, d)
        logits = torch.empty(len(part), len(weight), dtype=torch.float32, device=hidden.device)  # (m, V)
        narrow = torch.empty(len(part), len(weight), dtype=compute, device=hidden.device)  # (m, V)
        del logits
        product = torch.empty_like(d_weight)  # (V, d), of this tile
        del head, part, narrow, product
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.kind = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), (d_weight * d_total).to(ctx.kind), None, None


def head_loss(hidden: Tensor, weight: Tensor, tile: int, compute: torch.dtype) -> Tensor:
    """Sum over (N, d) hidden states against a (V, d) head, `tile` of them at a time, products in `compute`."""
    return _HeadLoss.apply(hidden, weight, tile, compute)


AttentionInterface.register(NAME, attention)
