"""The tiled head loss on fake tensors: it allocates what `ultralong.training.loss` does on a GPU and computes nothing.

The real one looks at values (which tokens have targets), which fake tensors have none of.

Legend: B batch, T tokens, V vocabulary, V' its rows with padding, d hidden size, N = B x T, m tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultralong.training.memory.logits import aligned_head


class _HeadLoss(torch.autograd.Function):
    """Every token a target: one tile's buffers, all of the gradients, the head's where it is trained.

    As on a GPU, where the log-sum-exp is one pass; without torch's compiler it holds one more tile of logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tile: int, compute: torch.dtype) -> Tensor:
        head = aligned_head(weight, compute)  # (V', d)
        losses = torch.zeros(hidden.shape[:1], device=hidden.device)  # (N,)
        d_hidden = torch.zeros_like(hidden)  # (N, d)
        wanted = ctx.needs_input_grad[1]
        d_weight = torch.zeros_like(head, dtype=torch.float32) if wanted else None  # (V', d)
        part = hidden[: min(tile, len(hidden))].to(compute)  # (m, d)
        logits = torch.empty(len(part), len(head), dtype=torch.float32, device=hidden.device)  # (m, V')
        narrow = torch.empty(len(part), len(head), dtype=compute, device=hidden.device)  # (m, V')
        del logits
        product = None if d_weight is None else torch.empty_like(d_weight)  # (V', d), of this tile
        del head, part, narrow, product
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight[: len(weight)])
        ctx.kind = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (d_total,), (d_hidden, d_weight) = grads, ctx.saved_tensors
        of_weight = None if d_weight is None else (d_weight * d_total).to(ctx.kind)
        return d_hidden * d_total.to(d_hidden.dtype), of_weight, None, None


def fake_head_loss(hidden: Tensor, weight: Tensor, tile: int, compute: torch.dtype) -> Tensor:
    """Sum over (N, d) hidden states against a (V, d) head, `tile` of them at a time, products in `compute`."""
    loss: Tensor = _HeadLoss.apply(hidden, weight, tile, compute)
    return loss
