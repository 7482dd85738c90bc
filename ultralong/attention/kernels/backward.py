"""Backward passes, made of the calls that a kernel has: gradients of one call, and partial gradients over calls.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

A key that queries of several calls see gets its gradient as a sum of partial gradients. Rounding each of them to
bfloat16 before they are added adds as much error as the one rounding of a single call: 1.2 times a good kernel's own
error. So they are accumulated in float32 (float64 for float64), by what each kernel can do:

* It accumulates in float32 itself (flash-attn 4 on Hopper with grouped heads; the reference).
* Of grouped heads it rounds each query head's part and then their sum (`rounds_per_query_head`: cuDNN, torch's flash,
  flash-attn 2). It is given repeated kv heads and the sum is taken here, so that the second rounding goes.
* 16-bit types on a CPU are computed in float32, which is no slower there.
* Otherwise (flash-attn 3; flash-attn 4 without grouped heads) each call's part is rounded again.

Of packed rows few keys are seen by several calls, those of documents that were cut. `backward_with_partials` leaves the
others' gradients as one call gives them, which spares passes over tensors twice as wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralong.attention.kernels.base import GQA, Kernel, PartialKVGrad
from ultralong.attention.kernels.fallbacks import (
    HeadGroups,
    bottom_right,
    flatten_batch,
    flatten_lse,
    has_varlen_call,
    head_groups,
    lacks_window,
    must_split_causal,
    without_needless_window,
)
from ultralong.attention.kernels.segments import for_each_segment
from ultralong.attention.kernels.windows import accumulate_in_squares
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.spec import AttentionSpec

Gradients = tuple[Tensor, Tensor, Tensor]


def attention_backward(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> Gradients:
    """Gradients of q, k and v from a saved pair (out, lse), which may be merged from several calls.

    Args as in `attention_forward`; dout and out are (B, T_q, H, D), lse is (B, H, T_q).
    """
    if spec.segments is not None and q.shape[0] > 1:
        rows = q.shape[0]
        one_row = spec.with_segments(spec.segments.repeat(rows))
        dout, q, k, v, out = (flatten_batch(x) for x in (dout, q, k, v, out))
        grads = attention_backward(kernel, dout, q, k, v, out, flatten_lse(lse), one_row)
        dq, dk, dv = (grad.unflatten(1, (rows, -1)).squeeze(0) for grad in grads)
        return dq, dk, dv
    spec = without_needless_window(k, spec)
    groups = head_groups(kernel, q, k)
    if len(groups) > 1:
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(q.dtype)) for x in (k, v))
        dq = _accumulate_by_heads(kernel, groups, dout, q, k, v, out, lse, spec, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    if spec.segments is not None and not has_varlen_call(kernel, spec):
        return _backward_by_segment(kernel, dout, q, k, v, out, lse, spec)
    if lacks_window(kernel, spec):
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(q.dtype)) for x in (k, v))
        dq = backward_accumulate(kernel, dout, q, k, v, out, lse, spec, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    if must_split_causal(kernel, q, k, spec) or (kernel.prefers_split_backward and bottom_right(q, k, spec)):
        return _backward_split(kernel, dout, q, k, v, out, lse, spec)
    if q.shape[2] == k.shape[2] or GQA in kernel.features:
        return kernel.backward(dout, q, k, v, out, lse, spec)
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    dq, dk, dv = kernel.backward(dout, q, keys, values, out, lse, spec)
    return dq, _sum_groups(dk, k.shape[2]), _sum_groups(dv, k.shape[2])


def backward_accumulate(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """As `attention_backward`, but this call's dK and dV are added to what is there.

    Other args as there; `dk` and `dv` (B, T_k, K, D) are in the accumulation dtype, may be slices, and change in place.
    Returns the gradient of q (B, T_q, H, D) in q's type.
    """
    if kernel.computes_in_fp32(q):
        dtype = q.dtype
        dout, q, k, v, out = (x.to(dk.dtype) for x in (dout, q, k, v, out))
        return backward_accumulate(kernel, dout, q, k, v, out, lse, spec, dk, dv).to(dtype)
    if spec.segments is not None and q.shape[0] > 1:
        rows = [slice(i, i + 1) for i in range(q.shape[0])]
        return torch.cat(
            [backward_accumulate(kernel, dout[i], q[i], k[i], v[i], out[i], lse[i], spec, dk[i], dv[i]) for i in rows]
        )
    spec = without_needless_window(k, spec)
    if len(groups := head_groups(kernel, q, k)) > 1:
        return _accumulate_by_heads(kernel, groups, dout, q, k, v, out, lse, spec, dk, dv)
    if spec.segments is not None and not has_varlen_call(kernel, spec):
        return _accumulate_by_segment(kernel, dout, q, k, v, out, lse, spec, dk, dv)
    if lacks_window(kernel, spec):
        return accumulate_in_squares(backward_accumulate, kernel, dout, q, k, v, out, lse, spec, dk, dv)
    if must_split_causal(kernel, q, k, spec) or (kernel.prefers_split_backward and bottom_right(q, k, spec)):
        return _accumulate_split(kernel, dout, q, k, v, out, lse, spec, dk, dv)
    if q.shape[2] != k.shape[2] and (GQA not in kernel.features or kernel.rounds_per_query_head):
        return _accumulate_by_query_head(kernel, dout, q, k, v, out, lse, spec, dk, dv)
    return kernel.backward_accumulate(dout, q, k, v, out, lse, spec, dk, dv)


def backward_with_partials(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor, list[PartialKVGrad]]:
    """As `attention_backward`, with unrounded partial gradients of keys that other calls' queries see as well.

    Args as in `attention_backward`; which keys those are is in `spec.segments`, all of them without segments.

    Returns:
        dq, dk, dv, and the partial gradients. Where there is one, dk and dv are not filled in: the sum of all calls'
        partial gradients belongs there.
    """
    segments = spec.segments
    if segments is None or _all_partial(kernel, q, k, spec):
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(q.dtype)) for x in (k, v))
        dq = backward_accumulate(kernel, dout, q, k, v, out, lse, spec, dk, dv)
        return dq, torch.empty_like(k), torch.empty_like(v), [(slice(0, k.shape[1]), dk, dv)]
    if has_varlen_call(kernel, spec):
        return kernel.backward_with_partials(dout, q, k, v, out, lse, spec)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    partials: list[PartialKVGrad] = []

    def work(index: int, rows: slice, keys: slice) -> None:
        tensors = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows])
        if segments.is_shared(index):
            to_keys, to_values = (torch.zeros_like(x[:, keys], dtype=accumulation_dtype(q.dtype)) for x in (k, v))
            dq[:, rows] = backward_accumulate(kernel, *tensors, spec.one_segment(), to_keys, to_values)
            partials.append((keys, to_keys, to_values))
        else:
            dq[:, rows], dk[:, keys], dv[:, keys] = attention_backward(kernel, *tensors, spec.one_segment())

    for_each_segment(segments, q, work, segments.is_shared)
    return dq, dk, dv, partials


def _all_partial(kernel: Kernel, q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
    """Whether all keys of a call get partial gradients: where others may see any, or this call gives no final ones."""
    segments = spec.segments
    if segments is None or segments.shared is None or q.shape[0] > 1:
        return True
    if len(head_groups(kernel, q, k)) > 1:  # several calls, whose sums of a kv head go across them
        return True
    if kernel.computes_in_fp32(q):
        return True
    grouped = has_varlen_call(kernel, spec) and q.shape[2] != k.shape[2]
    return grouped and (GQA not in kernel.features or bool(kernel.rounds_per_query_head and segments.shared))


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, D) to (B, T, K, D): what the query heads of a group send to their kv head, added in float32."""
    return grad.unflatten(2, (kv_heads, -1)).sum(3, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype)


def _backward_by_segment(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> Gradients:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def work(_: int, rows: slice, keys: slice) -> None:
        dq[:, rows], dk[:, keys], dv[:, keys] = attention_backward(
            kernel, dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], spec.one_segment()
        )

    assert spec.segments is not None
    for_each_segment(spec.segments, q, work)
    return dq, dk, dv


def _backward_split(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> Gradients:
    before, dtype = k.shape[1] - q.shape[1], q.dtype
    if kernel.computes_in_fp32(q):
        dout, q, k, v, out = (x.to(accumulation_dtype(dtype)) for x in (dout, q, k, v, out))
    dq, dk, dv = attention_backward(kernel, dout, q, k[:, before:], v[:, before:], out, lse, spec)
    dq_past, dk_past, dv_past = attention_backward(
        kernel, dout, q, k[:, :before], v[:, :before], out, lse, spec.non_causal()
    )
    dk, dv = torch.cat([dk_past, dk], 1), torch.cat([dv_past, dv], 1)
    return (dq + dq_past).to(dtype), dk.to(dtype), dv.to(dtype)  # two parts are added exactly, then rounded once


def _accumulate_by_heads(
    kernel: Kernel,
    groups: HeadGroups,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Groups of heads; several groups of query heads may share one kv head."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for (a, b), (c, d) in groups:
        dq[:, :, a:b] = backward_accumulate(
            kernel,
            dout[:, :, a:b].contiguous(),
            q[:, :, a:b].contiguous(),
            k[:, :, c:d].contiguous(),
            v[:, :, c:d].contiguous(),
            out[:, :, a:b].contiguous(),
            lse[:, a:b].contiguous(),
            spec,
            dk[:, :, c:d],
            dv[:, :, c:d],
        )
    return dq


def _accumulate_by_segment(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Segment by segment; keys that only this call's queries see are rounded once either way."""
    dq, one, segments = torch.empty_like(q), spec.one_segment(), spec.segments
    assert segments is not None

    def work(index: int, rows: slice, keys: slice) -> None:
        tensors = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows])
        if segments.is_shared(index):
            dq[:, rows] = backward_accumulate(kernel, *tensors, one, dk[:, keys], dv[:, keys])
            return
        dq[:, rows], to_keys, to_values = attention_backward(kernel, *tensors, one)
        dk[:, keys] += to_keys
        dv[:, keys] += to_values

    for_each_segment(segments, q, work)
    return dq


def _accumulate_split(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """The causal square and the full rectangle before it: no key is in both."""
    before = k.shape[1] - q.shape[1]
    dq = backward_accumulate(
        kernel, dout, q, k[:, before:], v[:, before:], out, lse, spec, dk[:, before:], dv[:, before:]
    )
    past = backward_accumulate(
        kernel, dout, q, k[:, :before], v[:, :before], out, lse, spec.non_causal(), dk[:, :before], dv[:, :before]
    )
    return dq + past  # two parts are added exactly, then rounded once


def _accumulate_by_query_head(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Kv heads repeated for their query heads, whose gradients are added here."""
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))  # (B, T_k, H, D)
    dq, *grads = kernel.backward(dout, q, keys, values, out, lse, spec)
    for total, grad in zip((dk, dv), grads, strict=True):
        total += grad.unflatten(2, (k.shape[2], -1)).sum(3, dtype=total.dtype)  # (B, T_k, K, D)
    return dq
