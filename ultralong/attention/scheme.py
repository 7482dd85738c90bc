"""A scheme: attention over a row that is distributed over ranks, as a forward and a backward from the saved pair.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, P ranks.

The pair is what a scheme's backward needs beside q, k and v: `out` (B, T, H, D) and `lse`, the log-sum-exp in the
scheme's own shape. Who stores the pair need not compute attention again in a recomputed forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, waiting
from ultralong.attention.kernels import Kernel, attention_forward, backward_accumulate
from ultralong.attention.kernels.head_chunks import backward_in_head_chunks
from ultralong.attention.lse_merge import accumulation_dtype, add_sink, merge_into_rounded, sink_gradient
from ultralong.attention.protocol import AttentionOutputStore, OutLse
from ultralong.attention.spec import AttentionSpec, VarlenSegments

Gradients = tuple[Tensor, Tensor, Tensor]
ANCHOR_TILE = 8192  # tokens whose scores with an anchor are computed at a time


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
        head_chunks: Parts of the heads whose backward pass is computed one after another.
    """

    kernel: Kernel
    segments: VarlenSegments | None = None
    head_chunks: int = 1

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
        """One kernel call for each head chunk; sums in float32, which others are added to, are made in one."""
        spec = spec.with_segments(self.segments)
        if not fp32_grads:
            return backward_in_head_chunks(self.kernel, dout, q, k, v, out, lse, spec, self.head_chunks)
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
        dq = backward_accumulate(self.kernel, dout, q, k, v, out, lse, spec, dk, dv)
        return dq, dk, dv


@dataclass(frozen=True)
class AnchorPlaces:
    """Where a process holds one anchor and the tokens that see it beside their own document.

    Attributes:
        own: The anchor's index among the process's tokens; None where another process has it.
        seen_from: Ranges of the process's tokens.
    """

    own: int | None
    seen_from: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Anchored(Scheme):
    """Documents that do not see each other, and one token of each row that all see: its anchor (AnchorAttention).

    The anchor's score joins the softmax of another scheme's result by the log-sum-exp, so it is exact with every kernel
    and scheme. As for a sink, the joined pair goes into the scheme's backward unchanged: `exp(score - lse)` and
    `sum_d dout * out` are then those of all keys that a query sees.

    Attributes:
        core: Attention inside the documents; the anchor's own document sees it there already.
        anchors: One a row; the same number on every process.
        groups: Groups over which the process's tokens are a part of the row; all call this together.
    """

    core: Scheme
    anchors: tuple[AnchorPlaces, ...]
    groups: tuple[Group, ...] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """The core's result with the anchors joined."""
        out, lse = self.core.attend(q, k, v, spec)
        anchors = self._gathered(k, v)  # (2, B, A, K, D)
        for index, places in self._pieces():
            score = _anchor_scores(q[:, places], anchors[0, :, index], spec)  # (B, H, t)
            value = _to_heads(anchors[1, :, index], q.shape[2])  # (B, 1, H, D)
            merge_into_rounded(out[:, places], lse[:, :, places], value, score)
        return out, lse

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
        """The core's gradients, the anchors' part added."""
        dq, dk, dv = self.core.attend_backward(dout, q, k, v, out, lse, spec, fp32_grads=fp32_grads)
        anchors = self._gathered(k, v)
        grads = torch.zeros_like(anchors)
        for index, places in self._pieces():
            query, gradient = q[:, places].to(anchors.dtype), dout[:, places].to(anchors.dtype)  # (B, t, H, D)
            key, value = (_to_heads(x[:, index], q.shape[2]) for x in anchors)  # (B, 1, H, D)
            score = _anchor_scores(query, anchors[0, :, index], spec)
            weight = torch.exp(score - lse[:, :, places]).transpose(1, 2).to(anchors.dtype)  # (B, t, H)
            delta = (gradient * (value - out[:, places].to(anchors.dtype))).sum(-1)
            d_score = (weight * delta * spec.scale).unsqueeze(-1)  # (B, t, H, 1)
            dq[:, places] += (d_score * key).to(dq.dtype)
            grads[0, :, index] += _to_kv_heads((d_score * query).sum(1), k.shape[2])
            grads[1, :, index] += _to_kv_heads((weight.unsqueeze(-1) * gradient).sum(1), k.shape[2])
        for group in self.groups:
            with waiting("sum of the anchors' gradients"):
                dist.all_reduce(grads, group=group)
        for index, anchor in enumerate(self.anchors):
            if anchor.own is not None:
                dk[:, anchor.own] += grads[0, :, index].to(dk.dtype)
                dv[:, anchor.own] += grads[1, :, index].to(dv.dtype)
        return dq, dk, dv

    def _gathered(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values of the anchors (2, B, A, K, D), on every process."""
        found = k.new_zeros((2, k.shape[0], len(self.anchors), *k.shape[2:]), dtype=accumulation_dtype(k.dtype))
        for index, anchor in enumerate(self.anchors):
            if anchor.own is not None:
                found[0, :, index], found[1, :, index] = k[:, anchor.own], v[:, anchor.own]
        for group in self.groups:
            with waiting("keys and values of the anchors"):
                dist.all_reduce(found, group=group)
        return found

    def _pieces(self) -> Iterator[tuple[int, slice]]:
        """Each anchor with ranges of tokens that see it, a bounded number of them at a time."""
        for index, anchor in enumerate(self.anchors):
            for places in anchor.seen_from:
                for start in range(places.start, places.stop, ANCHOR_TILE):
                    yield index, slice(start, min(start + ANCHOR_TILE, places.stop))


def _anchor_scores(q: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor:
    """Scores (B, H, t) of queries (B, t, H, D) with one key (B, K, D), in the key's type."""
    return ((q.to(key.dtype) * _to_heads(key, q.shape[2])).sum(-1) * spec.scale).transpose(1, 2)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, K, D) to (B, 1, H, D): each query head's kv head."""
    return x.repeat_interleave(heads // x.shape[1], 1).unsqueeze(1)


def _to_kv_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, D) to (B, K, D): the sum over the query heads of a kv head."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)


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
