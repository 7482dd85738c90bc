"""Softmax in parts: joining partial results by their log-sum-exp, and attention sinks from the same pair.

Legend: B batch, T tokens, H heads, D head size. `out` is (B, T, H, D), `lse` is (B, H, T) = log sum_j exp(score_ij).

With `p = sigmoid(lse_b - lse_a)`, the joined result of parts a and b is `out = out_a + p (out_b - out_a)` and
`lse = logaddexp(lse_a, lse_b)`. Nothing is exponentiated that can overflow, and everything is kept in float32 (float64
for float64 input) until the last part has come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralong.utils.compiled import OnePass


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
    weight = _weight(lse, part_lse)
    out.lerp_(part.to(out.dtype), per_token(weight).to(out.dtype))


def merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """The same with a new `out`, in one pass over memory on a GPU; `lse` is changed in place.

    Args:
        out: (B, T, H, D) in any type.
        lse: (B, H, T) in the accumulating type.
        part: (B, T, H, D) in any type.
        part_lse: (B, H, T).

    Returns:
        (B, T, H, D) in out's type, computed in the accumulating type and rounded once.
    """
    weight = _weight(lse, part_lse).transpose(1, 2).flatten(0, 1)  # (B T, H)
    return _between(out.flatten(0, 1), part.flatten(0, 1), weight).view(out.shape)


def _weight(lse: Tensor, part_lse: Tensor) -> Tensor:
    """How much of the joined result is the part's (B, H, T), 1 where lse is -inf; lse becomes that of both."""
    weight = torch.sigmoid(part_lse - lse)
    lse.copy_(torch.logaddexp(lse, part_lse))
    return weight


def _mean(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Of a and b (N, H, D), b with `weight` (N, H) and in its type; rounded to a's."""
    return torch.lerp(a.to(weight.dtype), b.to(weight.dtype), weight.unsqueeze(-1)).to(a.dtype)


_between = OnePass(_mean)


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
