"""Merging partial attention results by their log-sum-exp, and attention sinks from the same pair.

Legend: B batch, T tokens, n tokens of a range of rows, H heads, D head size. `out` is
(B, T, H, D), `lse` is (B, H, T) = log sum_j exp(score_ij).

With `p = sigmoid(lse_b - lse_a)`, the merged result of parts a and b is `out = out_a + p (out_b - out_a)` and
`lse = logaddexp(lse_a, lse_b)`. Nothing is exponentiated that can overflow, and everything is kept in float32 (float64
for float64 input) until the last part has come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultralong.utils.compiled import CheckedCompile


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results are added: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_token(statistic: Tensor) -> Tensor:
    """(B, H, T) to (B, T, H, 1), so that it multiplies an output."""
    return statistic.transpose(1, 2).unsqueeze(-1)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge one more partial result into `out` and `lse`, in place.

    Args:
        out: (B, T, H, D) in the accumulation dtype, may be a slice of a larger tensor.
        lse: (B, H, T), likewise; -inf where nothing was seen yet.
        part: (B, T, H, D) in any type.
        part_lse: (B, H, T), finite (each query of a part sees at least one key).
    """
    weight = _weight(lse, part_lse)
    out.lerp_(part.to(out.dtype), per_token(weight).to(out.dtype))


def merge_into_rounded(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """As `merge_into` for an `out` (B, T, H, D) in any type, computed in the accumulation dtype and rounded once.

    Args:
        out: (B, T, H, D), may be a slice of a larger tensor.
        lse: (B, H, T), likewise.
        part: Of `out`'s shape or one that broadcasts to it.
        part_lse: (B, H, T).
    """
    weight = per_token(_weight(lse, part_lse.to(lse.dtype)))
    out.copy_(torch.lerp(out.to(lse.dtype), part.to(lse.dtype).expand_as(out), weight))


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """As `merge_into` with a new `out`, in one pass over memory on a GPU; `lse` is changed in place.

    Args:
        out: (B, T, H, D) in any type.
        lse: (B, H, T) in the accumulation dtype.
        part: (B, T, H, D) in any type.
        part_lse: (B, H, T).

    Returns:
        (B, T, H, D) in out's type, computed in the accumulation dtype and rounded once.
    """
    weight = _weight(lse, part_lse).transpose(1, 2).flatten(0, 1)  # (B T, H)
    return _lerp_rows(out.flatten(0, 1), part.flatten(0, 1), weight).view(out.shape)


def _weight(lse: Tensor, part_lse: Tensor) -> Tensor:
    """How much of the merged result is the part's (B, H, T), 1 where lse is -inf; lse becomes that of both."""
    weight = torch.sigmoid(part_lse - lse)
    lse.copy_(torch.logaddexp(lse, part_lse))
    return weight


def _lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Of a and b (N, H, D), b with `weight` (N, H) and in its type; rounded to a's."""
    return torch.lerp(a.to(weight.dtype), b.to(weight.dtype), weight.unsqueeze(-1)).to(a.dtype)


_lerp_compiled = CheckedCompile(_lerp)


@torch.library.custom_op("ultralong::lerp_rows", mutates_args=())
def _lerp_rows(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return _lerp_compiled(a, b, weight)


@_lerp_rows.register_fake
def _(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let every query also see one key of score `sink` and value zero (the attention sink of gpt-oss).

    The returned pair goes into a kernel's backward unchanged: with it, `exp(score - lse)` is the probability with
    the sink in the sum, and `sum_d dout * out` is right because the sink's value is zero.

    Args:
        out: (B, T, H, D).
        lse: (B, H, T).
        sink: (H,).
    """
    merged_lse = torch.logaddexp(lse, sink.to(lse.dtype)[None, :, None])  # (B, H, T)
    factor = torch.exp(lse - merged_lse)
    return (out.to(lse.dtype) * per_token(factor)).to(out.dtype), merged_lse


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sink logits (H,), from the pair that `add_sink` returned.

    d loss / d sink_h = - sum_{b,t} exp(sink_h - lse) * sum_d dout * out.
    """
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)  # (B, H, T)
    sink_probability = torch.exp(sink.to(lse.dtype)[None, :, None] - lse)
    return -(sink_probability * delta).sum((0, 2)).to(sink.dtype)


class PartialRows:
    """Rows of a result that several calls contribute to, kept in one dtype until all have come.

    Args:
        x: (B, T, H, D), what the first call gave; its memory may be reused for the result.
        rows: Which rows later calls contribute to, ranges apart; the others are left alone.
        dtype: The dtype to accumulate in.
    """

    def __init__(self, x: Tensor, rows: Sequence[slice], dtype: torch.dtype) -> None:
        self._x, self._rows = x, rows
        self._parts = [x[:, place].to(dtype) for place in rows]  # of x's own type: views

    def at(self, rows: slice) -> Tensor:
        """Some of those rows (B, n, H, D), to be read or changed in place."""
        index, inside = self._find(rows)
        return self._parts[index][:, inside]

    def set(self, rows: slice, part: Tensor) -> None:
        """Let some of those rows be `part` (B, n, H, D), which is kept where it is all of a range."""
        index, inside = self._find(rows)
        if part.shape == self._parts[index].shape:
            self._parts[index] = part
        else:
            self._parts[index][:, inside] = part

    def result(self) -> Tensor:
        """The tensor (B, T, H, D) with its rows in place, rounded to its type."""
        for place, part in zip(self._rows, self._parts, strict=True):
            if part.shape == self._x.shape and part.dtype == self._x.dtype:
                return part
            if part.untyped_storage().data_ptr() != self._x.untyped_storage().data_ptr():  # else it is in its place
                self._x[:, place] = part
        return self._x

    def _find(self, rows: slice) -> tuple[int, slice]:
        """Which range holds some rows, and where in it."""
        for index, place in enumerate(self._rows):
            if place.start <= rows.start and rows.stop <= place.stop:
                return index, slice(rows.start - place.start, rows.stop - place.start)
        raise LookupError(f"rows {rows.start} to {rows.stop} are not among those that later calls contribute to")
