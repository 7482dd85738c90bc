"""Attention and head loss that allocate what the real ones do and compute nothing.

The real ones look at values (which tokens have targets) or run kernels that no fake tensor can; memory and work depend
on neither.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, V vocabulary, N = B x T, m tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "ultralong-plan"


class _Attention(torch.autograd.Function):
    """Fused attention on one rank's tokens, as `ultralong.attention`: saves q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchanged: int) -> Tensor:
        # Ulysses' copies by head: what is sent and what arrives, of one stage's heads.
        moved = [_part(x, exchanged) for x in (q, k, v) for _ in range(2)] if exchanged else []
        out = torch.empty_like(q)  # (B, T, H, D)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)  # (B, T, H)
        if exchanged:
            moved += [_part(out, exchanged), _part(out, exchanged)]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.exchanged = exchanged
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, _lse = ctx.saved_tensors
        stages = ctx.exchanged
        moved = [_part(x, stages) for x in (q, k, v, out, dout) for _ in range(2)] if stages else []
        # Kernels sum the gradient of q over blocks of keys in float32, and hold out * dout summed over D.
        accumulator = _part(q, max(1, stages), torch.float32)  # (B, T, H, D)
        delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)  # (B, T, H)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        if stages:
            moved += [_part(x, stages) for x in grads]
        del accumulator, delta, moved
        return (*grads, None)


def _part(x: Tensor, stages: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a stage's share of x's heads (B, T, H, D)."""
    shape = (*x.shape[:2], -(-x.shape[2] // stages), x.shape[3])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              exchanged: int = 0, **kwargs: Any) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (B, H, T, D) in, (B, T, H, D) out."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    return _Attention.apply(*(x.transpose(1, 2) for x in (query, key, value)), exchanged), None


class _HeadLoss(torch.autograd.Function):
    """`ultralong.training.loss` with every token a target: one tile's buffers, all of the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tile: int, compute: torch.dtype) -> Tensor:
        head = weight.to(compute)  # (V, d)
        losses = torch.zeros(hidden.shape[:1], device=hidden.device)  # (N,)
        d_hidden = torch.zeros_like(hidden)  # (N, d)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)  # (V, d)
        part = hidden[: min(tile, len(hidden))].to(compute)  # (m, d)
        logits = torch.empty(len(part), len(weight), dtype=torch.float32, device=hidden.device)  # (m, V)
        before = torch.empty(len(part), len(weight), dtype=compute, device=hidden.device)  # of the tile before this one
        shifted = torch.empty_like(logits)  # (m, V), inside of logsumexp
        del before, shifted
        narrow = torch.empty(len(part), len(weight), dtype=compute, device=hidden.device)  # (m, V)
        product = torch.empty_like(d_weight)  # (V, d), of this tile
        del head, part, logits, narrow, product
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
