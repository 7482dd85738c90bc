"""Softmax in parts: joining partial results by their log-sum-exp, and attention sinks from the same pair.

Legend: B batch, T tokens, H heads, D head size. `out` is (B, T, H, D), `lse` is (B, H, T) = log sum_j exp(score_ij).

With `p = sigmoid(lse_b - lse_a)`, the joined result of parts a and b is `out = out_a + p (out_b - out_a)` and
`lse = logaddexp(lse_a, lse_b)`. Nothing is exponentiated that can overflow, and everything is kept in float32 (float64
for float64 input) until the last part has come.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which parts are added: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_token(statistic: Tensor) -> Tensor:
    """(B, H, T) to (B, T, H, 1), so that it multiplies an output."""
    return statistic.transpose(1, 2).unsqueeze(-1)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join one more part into `out` and `lse`, in place.

    Args:
        out: (B, T, H, D) in the accumulating type, may be a slice of a larger tensor.
        lse: (B, H, T), likewise; -inf where nothing was seen yet.
        part: (B, T, H, D) in any type.
        part_lse: (B, H, T), finite (each query of a part sees at least one key).
    """
    weight = torch.sigmoid(part_lse - lse)  # (B, H, T); 1 where lse is -inf
    out.lerp_(part.to(out.dtype), per_token(weight).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let every query also see one key of score `sink` and value zero (the attention sink of gpt-oss).

    The returned pair goes into a kernel's backward unchanged: with it, `exp(score - lse)` is the probability with
    the sink in the sum, and `sum_d dout * out` is right because the sink's value is zero.

    Args:
        out: (B, T, H, D).
        lse: (B, H, T).
        sink: (H,).
    """
    joined = torch.logaddexp(lse, sink.to(lse.dtype)[None, :, None])  # (B, H, T)
    factor = torch.exp(lse - joined)
    return (out.to(lse.dtype) * per_token(factor)).to(out.dtype), joined


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sink logits (H,), from the pair that `add_sink` returned.

    d loss / d sink_h = - sum_{b,t} exp(sink_h - lse) * sum_d dout * out.
    """
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)  # (B, H, T)
    share = torch.exp(sink.to(lse.dtype)[None, :, None] - lse)
    return -(share * delta).sum((0, 2)).to(sink.dtype)
