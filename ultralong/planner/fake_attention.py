"""Attention and head loss that allocate what the real ones do and compute nothing.

The real ones look at values (which tokens have targets) or run kernels that no fake tensor can; memory and work depend
on neither.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, V vocabulary, N = B x T, m tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ultralong.planner.fake_gathered import Gathered

NAME = "ultralong-plan"


@dataclass(frozen=True)
class Attention:
    """A scheme that allocates what Ulysses does over several ranks, or one kernel on one rank.

    Attributes:
        stages: Head chunks that tokens are traded for; 0 where nothing is exchanged.
        ranks: That share the row.
    """

    stages: int
    ranks: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Any = None, sink: Any = None) -> tuple[Tensor, Tensor]:
        """Out (B, T, H, D) and lse (B, T, H)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if self.stages:
            heads = Heads.of(q, k, self)
            repeated = heads.repeated_keys(k)
            self._exchange(heads, q, 1, lambda _: [_part(out, heads.queries)])
            del repeated
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rule: Any = None,
        sink: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        if not self.stages:
            _sums(q, q.shape[2], k.shape[2])
            return dq, dk, dv, None
        heads = Heads.of(q, k, self)
        repeated, totals = heads.repeated_keys(k), list[Tensor]()
        wide = torch.float32 if repeated else k.dtype  # copies of a head add up
        home = [_part(k, heads.all_keys, wide) for _ in repeated]

        def compute(stage: int) -> list[Tensor]:
            sums = _sums(q, heads.queries, heads.keys)
            part = _part(q, heads.queries)
            to_keys = [_part(k, heads.keys, torch.float32 if heads.shared > 1 else k.dtype) for _ in range(2)]
            del sums
            totals[:] = to_keys if heads.is_first(stage) else [torch.empty_like(x) for x in to_keys]
            return [part, *(x.to(wide) for x in totals if heads.is_last(stage))]

        self._exchange(heads, q, 3, compute)
        del repeated, home
        return dq, dk, dv, None

    def _exchange(self, heads: Heads, q: Tensor, like_q: int, compute: Callable[[int], list[Tensor]]) -> None:
        """A stage's tensors leave and arrive in one buffer each, while the stage before it computes."""

        def trade(stage: int) -> list[Tensor]:
            count = like_q * heads.queries + 2 * heads.keys * heads.is_first(stage)
            return [_part(q, count) for _ in ("leaving", "arriving")] if stage < self.stages else []

        coming, landing, held = trade(0), [], None
        for stage in range(self.stages):
            arrived = coming.pop()
            held = arrived if heads.is_first(stage) else held  # the keys, with the queries they arrived beside
            coming = trade(stage + 1)
            results = compute(stage)
            landing.append([*results, *map(torch.empty_like, results)])
            del arrived, results
            landing = landing[-1:]
        del held


@dataclass(frozen=True)
class Heads:
    """How Ulysses trades heads. A rank's part of a stage, all tokens of a few heads, is its own tokens of more heads.

    Attributes:
        all_keys: Kv heads, each as often as there are ranks that need it.
        queries: Query heads of a stage, of all ranks.
        keys: Kv heads of a stage, of all ranks.
        shared: Stages that have the same keys.
    """

    all_keys: int
    queries: int
    keys: int
    shared: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scheme: Attention) -> Heads:
        """Those of q (B, T, H, D) and k (B, T, K, D).

        A ring, which is counted as if it traded too, needs no heads that split over its ranks and repeats none.
        """
        all_keys = math.lcm(k.shape[2], scheme.ranks)
        if q.shape[2] % all_keys:
            all_keys = k.shape[2]
        blocks = min(scheme.stages, max(1, all_keys // scheme.ranks))
        return cls(all_keys, -(-q.shape[2] // scheme.stages), all_keys // blocks, scheme.stages // blocks)

    def is_first(self, stage: int) -> bool:
        """Whether a stage is the first one with its keys."""
        return stage % self.shared == 0

    def is_last(self, stage: int) -> bool:
        """Whether it is the last one."""
        return stage % self.shared == self.shared - 1

    def repeated_keys(self, k: Tensor) -> list[Tensor]:
        """Keys and values as often as they are needed, if that is more than once."""
        return [_part(k, self.all_keys) for _ in range(2 * (self.all_keys > k.shape[2]))]


def _sums(q: Tensor, queries: int, keys: int) -> list[Tensor]:
    """Kernels sum gradients over blocks in float32 and hold out * dout summed over D."""
    return [
        *(_part(q, heads, torch.float32) for heads in (queries, keys, keys)),
        torch.empty((*q.shape[:2], queries), dtype=torch.float32, device=q.device),
    ]


def _part(x: Tensor, heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """So many heads of x's tokens, (B, T, heads, D)."""
    return torch.empty((*x.shape[:2], heads, x.shape[3]), dtype=dtype or x.dtype, device=x.device)


@dataclass(frozen=True)
class Context:
    """What the trainer's own layers ask of an attention context.

    Attributes:
        stages: As in `Attention`.
        ranks: As in `Attention`.
        gathered: Whether keys are gathered instead of trading tokens for heads.
    """

    stages: int
    ranks: int
    gathered: bool = False

    @property
    def scheme(self) -> Attention | Gathered:
        """Who attends."""
        return (Gathered if self.gathered else Attention)(self.stages, self.ranks)

    def scheme_and_spec(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Attention | Gathered, None]:
        """The scheme, and no rule."""
        return self.scheme, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scheme: Attention | Gathered) -> Tensor:
        out, lse = scheme.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scheme = scheme
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.scheme.backward(dout, *ctx.saved_tensors)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_context: Context,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (B, H, T, D) in, (B, T, H, D) out."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    return _Attention.apply(*(x.transpose(1, 2) for x in (query, key, value)), attention_context.scheme), None


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
