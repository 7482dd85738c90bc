"""A scheme: attention over a row that is shared out over ranks, as a forward and a backward from the saved pair.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, P ranks.

The pair is what a scheme's backward needs beside q, k and v: `out` (B, T, H, D) and `lse`, the log-sum-exp in the
scheme's own shape. Who keeps the pair need not compute attention again in a recomputed forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ultralong.attention.kernels import Kernel, add_backward, attention_backward, attention_forward
from ultralong.attention.lse_merge import accumulator, add_sink, sink_gradient
from ultralong.attention.spec import Rule, Spans

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Scheme(ABC):
    """Attention of this rank's queries with everyone's keys, exactly as one process would compute it."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """(out, lse) of this rank's tokens. q (B, T, H, D); k, v (B, T, K, D)."""

    @abstractmethod
    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, *, wide: bool = False
    ) -> Gradients:
        """Gradients of this rank's q, k and v; where `wide`, those of k and v unrounded, to be added up."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, sink: Tensor | None = None) -> Pair:
        """`attend`, with one more key of score `sink` (H,) and value zero for every query when given."""
        out, lse = self.attend(q, k, v, rule)
        return (out, lse) if sink is None else add_sink(out, lse, sink)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rule: Rule,
        sink: Tensor | None = None,
        *,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and of the sink: this rank's share of it, as for any replicated parameter."""
        grads = self.attend_backward(dout, q, k, v, out, lse, rule, wide=wide)
        return *grads, None if sink is None else sink_gradient(dout, out, lse, sink)


@dataclass(frozen=True, eq=False)
class Local(Scheme):
    """One process has the whole row.

    Attributes:
        kernel: Who computes.
        spans: The documents, or None when every token sees all before it.
    """

    kernel: Kernel
    spans: Spans | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """One kernel call."""
        return attention_forward(self.kernel, q, k, v, rule.with_spans(self.spans))

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, *, wide: bool = False
    ) -> Gradients:
        """One kernel call."""
        if not wide:
            return attention_backward(self.kernel, dout, q, k, v, out, lse, rule.with_spans(self.spans))
        dk, dv = (torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (k, v))
        dq = add_backward(self.kernel, dout, q, k, v, out, lse, rule.with_spans(self.spans), dk, dv)
        return dq, dk, dv
