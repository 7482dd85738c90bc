"""Calls that a kernel lacks, made of calls that it has; every other module computes attention through here.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

In this order: rows of a packed batch are laid end to end; heads are taken in groups where a tensor would outgrow the
kernel's index; segments are walked one by one where the kernel has no packed call; a sliding window is cut into causal
squares where it has none (`ultralong.attention.kernels.windows`); a causal rectangle becomes a full rectangle and a
causal square, merged by their log-sum-exp; kv heads are repeated where the kernel needs as many as query heads. Each
step only runs when the kernel needs it. The way back is in `ultralong.attention.kernels.backward`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, VARLEN, WINDOW, Kernel
from ultralong.attention.kernels.segments import for_each_segment
from ultralong.attention.kernels.windows import forward_in_squares
from ultralong.attention.lse_merge import accumulation_dtype, merge_into
from ultralong.attention.spec import AttentionSpec

HeadGroups = list[tuple[tuple[int, int], tuple[int, int]]]  # ranges of query heads, and of their kv heads


def attention_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention by one kernel, whatever it lacks.

    Args:
        kernel: Who computes.
        q: (B, T_q, H, D).
        k: (B, T_k, K, D).
        v: (B, T_k, K, D).
        spec: Which keys are seen; its segments, if any, hold for every row of the batch.

    Returns:
        out (B, T_q, H, D) in q's type and lse (B, H, T_q) in float32 (float64 for float64 input).
    """
    if spec.segments is not None and q.shape[0] > 1:
        rows = q.shape[0]
        one_row = spec.with_segments(spec.segments.repeat(rows))
        out, lse = attention_forward(kernel, flatten_batch(q), flatten_batch(k), flatten_batch(v), one_row)
        return out.unflatten(1, (rows, -1)).squeeze(0), _split_rows(lse, rows)
    spec = without_needless_window(k, spec)
    groups = head_groups(kernel, q, k)
    if len(groups) > 1:
        parts = [
            attention_forward(
                kernel, q[:, :, a:b].contiguous(), k[:, :, c:d].contiguous(), v[:, :, c:d].contiguous(), spec
            )
            for (a, b), (c, d) in groups
        ]
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 1)
    if spec.segments is not None and not has_varlen_call(kernel, spec):
        return _forward_by_segment(kernel, q, k, v, spec)
    if lacks_window(kernel, spec):
        return forward_in_squares(attention_forward, kernel, q, k, v, spec)
    if must_split_causal(kernel, q, k, spec):
        return _forward_split(kernel, q, k, v, spec)
    if q.shape[2] != k.shape[2] and GQA not in kernel.features:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    return kernel.forward(q, k, v, spec)


def flatten_batch(x: Tensor) -> Tensor:
    """Rows of a batch laid end to end."""
    return x.reshape(1, -1, *x.shape[2:])  # (B, T, H, D) -> (1, B T, H, D)


def flatten_lse(lse: Tensor) -> Tensor:
    """Log-sum-exps of the rows of a batch laid end to end."""
    return lse.transpose(0, 1).reshape(1, lse.shape[1], -1)  # (B, H, T) -> (1, H, B T)


def _split_rows(lse: Tensor, rows: int) -> Tensor:
    return lse[0].unflatten(1, (rows, -1)).transpose(0, 1)  # (1, H, B T) -> (B, H, T)


def without_needless_window(k: Tensor, spec: AttentionSpec) -> AttentionSpec:
    """The spec of a causal call without a window that reaches over all of its keys (B, T_k, K, D)."""
    longest = k.shape[1] if spec.segments is None else spec.segments.max_seqlen_k
    return replace(spec, window=None) if spec.causal and spec.window is not None and spec.window >= longest else spec


def lacks_window(kernel: Kernel, spec: AttentionSpec) -> bool:
    """Whether a call has a window and the kernel has none."""
    return spec.window is not None and WINDOW not in kernel.features


def has_varlen_call(kernel: Kernel, spec: AttentionSpec) -> bool:
    """Whether a kernel has one varlen call for the segments of this spec."""
    if spec.segments is None or VARLEN not in kernel.features or lacks_window(kernel, spec):
        return False
    return spec.segments.square or BOTTOM_RIGHT in kernel.features


def must_split_causal(kernel: Kernel, q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
    """Whether a causal call must become a square and a full rectangle."""
    return spec.causal and spec.segments is None and q.shape[1] != k.shape[1] and BOTTOM_RIGHT not in kernel.features


def bottom_right(q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
    """Whether a causal call has keys before its first query."""
    return spec.causal and spec.window is None and spec.segments is None and q.shape[1] < k.shape[1]


def head_groups(kernel: Kernel, q: Tensor, k: Tensor) -> HeadGroups:
    """Ranges of query heads and of their kv heads, each small enough for the kernel's index."""
    heads, kv_heads = q.shape[2], k.shape[2]
    most = max(q.numel() // heads, k.numel() // kv_heads)  # elements of one head
    at_once = max(1, min(heads, kernel.max_elements // max(1, most)))
    group = heads // kv_heads
    if at_once >= group:
        step = at_once // group
        return [
            ((i * group, min(i + step, kv_heads) * group), (i, min(i + step, kv_heads)))
            for i in range(0, kv_heads, step)
        ]
    return [
        ((i, min(i + at_once, (i // group + 1) * group)), (i // group, i // group + 1))
        for j in range(kv_heads)
        for i in range(j * group, (j + 1) * group, at_once)
    ]


def _forward_by_segment(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))

    def work(_: int, rows: slice, keys: slice) -> None:
        out[:, rows], lse[:, :, rows] = attention_forward(
            kernel, q[:, rows], k[:, keys], v[:, keys], spec.one_segment()
        )

    assert spec.segments is not None
    for_each_segment(spec.segments, q, work)
    return out, lse


def _forward_split(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys before the first query, all seen, and the causal square after them."""
    before, dtype = k.shape[1] - q.shape[1], q.dtype
    if kernel.computes_in_fp32(q):
        q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
    square, lse = attention_forward(kernel, q, k[:, before:], v[:, before:], spec)
    past, past_lse = attention_forward(kernel, q, k[:, :before], v[:, :before], spec.non_causal())
    out, lse = square.to(accumulation_dtype(dtype)), lse.clone()
    merge_into(out, lse, past, past_lse)
    return out.to(dtype), lse
