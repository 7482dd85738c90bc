"""A scheme: attention over a row that is distributed over ranks, as a forward and a backward from the saved pair.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, P ranks.

The pair is what a scheme's backward needs beside q, k and v: `out` (B, T, H, D) and `lse`, the log-sum-exp in the
scheme's own shape. Who stores the pair need not compute attention again in a recomputed forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.kernels import Kernel, attention_backward, attention_forward, backward_accumulate
from ultralong.attention.lse_merge import accumulation_dtype, add_sink, sink_gradient
from ultralong.attention.protocol import AttentionOutputStore, OutLse
from ultralong.attention.spec import AttentionSpec, VarlenSegments

Gradients = tuple[Tensor, Tensor, Tensor]


class Scheme(ABC):
    """Attention of this rank's queries with everyone's keys, exactly as one process would compute it."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """(out, lse) of this rank's tokens. q (B, T, H, D); k, v (B, T, K, D)."""

    @abstractmethod
    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        *,
        fp32_grads: bool = False,
    ) -> Gradients:
        """Gradients of this rank's q, k and v.

        With `fp32_grads`, dK and dV are partial sums in the accumulation dtype (float32; float64 for float64), not
        rounded to k's dtype: the caller adds others to them.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sink: Tensor | None = None) -> OutLse:
        """`attend`, with one more key of score `sink` (H,) and value zero for every query when given."""
        out, lse = self.attend(q, k, v, spec)
        return (out, lse) if sink is None else add_sink(out, lse, sink)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        sink: Tensor | None = None,
        *,
        fp32_grads: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and of the sink: this rank's part of it, as for any replicated parameter."""
        grads = self.attend_backward(dout, q, k, v, out, lse, spec, fp32_grads=fp32_grads)
        return *grads, None if sink is None else sink_gradient(dout, out, lse, sink)


@dataclass(frozen=True, eq=False)
class Local(Scheme):
    """One process has the whole row.

    Attributes:
        kernel: Who computes.
        segments: The documents, or None when every token sees all before it.
    """

    kernel: Kernel
    segments: VarlenSegments | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """One kernel call."""
        return attention_forward(self.kernel, q, k, v, spec.with_segments(self.segments))

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        *,
        fp32_grads: bool = False,
    ) -> Gradients:
        """One kernel call."""
        spec = spec.with_segments(self.segments)
        if not fp32_grads:
            return attention_backward(self.kernel, dout, q, k, v, out, lse, spec)
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
        dq = backward_accumulate(self.kernel, dout, q, k, v, out, lse, spec, dk, dv)
        return dq, dk, dv


class _Attention(torch.autograd.Function):
    """The autograd function of every scheme: forward gives the saved pair, backward starts from it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        scheme: Scheme,
        spec: AttentionSpec,
        stored: OutLse | None,
    ) -> OutLse:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = scheme.forward(q, k, v, spec, sink) if stored is None else stored
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.scheme, ctx.spec = scheme, spec
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = ctx.scheme.backward(dout.contiguous(), q, k, v, out, lse, ctx.spec, sink)
        return (*grads, None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: Scheme,
    spec: AttentionSpec,
    *,
    sink: Tensor | None = None,
    store: AttentionOutputStore | None = None,
    layer: int = 0,
) -> Tensor:
    """Differentiable attention of this rank's tokens.

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        scheme: How it is distributed.
        spec: Which keys are seen, and how scores are formed (its segments are the scheme's to fill in).
        sink: (H,) learned logits of one more key with value zero.
        store: Stores the output over a recomputed forward pass.
        layer: The store's index for this call.

    Returns:
        (B, T, H, D).
    """
    stored = None if store is None else store.pop(layer)
    out, lse = _Attention.apply(q, k, v, sink, scheme, spec, stored)
    if store is not None and stored is None:
        store.save(layer, out.detach(), lse)
    return out
