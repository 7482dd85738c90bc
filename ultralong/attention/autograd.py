"""The autograd function of every scheme: forward gives the saved pair, backward starts from it.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ultralong.attention.scheme import Pair, Scheme
from ultralong.attention.spec import Rule


class AttentionKeeper(Protocol):
    """Who keeps attention results over a recomputed forward pass, so that attention is computed once.

    Under activation checkpointing a layer's forward runs twice. The first time `take` has nothing and the result is
    handed to `put`; the second time `take` gives it back and no kernel and no exchange runs. Where the pair stays in
    between (on the device, in host memory, or nowhere) is the keeper's business.
    """

    def take(self, layer: int) -> Pair | None:
        """The pair (out, lse) kept for a layer, given up by the keeper; None when it has none."""

    def put(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Offer a layer's pair; the keeper may ignore it."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scheme: Scheme, rule: Rule, kept: Pair | None
    ) -> Pair:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = scheme.forward(q, k, v, rule, sink) if kept is None else kept
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.scheme, ctx.rule = scheme, rule
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = ctx.scheme.backward(dout.contiguous(), q, k, v, out, lse, ctx.rule, sink)
        return (*grads, None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: Scheme,
    rule: Rule,
    *,
    sink: Tensor | None = None,
    keeper: AttentionKeeper | None = None,
    layer: int = 0,
) -> Tensor:
    """Differentiable attention of this rank's tokens.

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        scheme: How it is shared out.
        rule: Which keys are seen, and how scores are formed (its pieces are the scheme's to fill in).
        sink: (H,) learned logits of one more key with value zero.
        keeper: Keeps the result over a recomputed forward pass.
        layer: The keeper's name for this call.

    Returns:
        (B, T, H, D).
    """
    kept = None if keeper is None else keeper.take(layer)
    out, lse = _Attention.apply(q, k, v, sink, scheme, rule, kept)
    if keeper is not None and kept is None:
        keeper.put(layer, out.detach(), lse)
    return out
