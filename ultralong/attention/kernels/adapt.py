"""Calls that a kernel lacks, made of calls that it has; every other module computes attention through here.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

In this order: rows of a packed batch are laid end to end; heads are taken in groups where a tensor would outgrow the
kernel's index; pieces are walked one by one where the kernel has no packed call; a causal rectangle becomes a full
rectangle and a causal square, joined by their log-sum-exp; kv heads are repeated where the kernel wants as many as
query heads. Each step only runs when the kernel needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, VARLEN, Kernel
from ultralong.attention.merge import accumulator, merge_into
from ultralong.attention.rule import Rule, Spans

Gradients = tuple[Tensor, Tensor, Tensor]


def attention_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention by one kernel, whatever it lacks.

    Args:
        kernel: Who computes.
        q: (B, T_q, H, D).
        k: (B, T_k, K, D).
        v: (B, T_k, K, D).
        rule: Which keys are seen; its pieces, if any, hold for every row of the batch.

    Returns:
        out (B, T_q, H, D) in q's type and lse (B, H, T_q) in float32 (float64 for float64 input).
    """
    if rule.spans is not None and q.shape[0] > 1:
        rows = q.shape[0]
        joined = rule.with_spans(rule.spans.repeat(rows))
        out, lse = attention_forward(kernel, _joined(q), _joined(k), _joined(v), joined)
        return out.unflatten(1, (rows, -1)).squeeze(0), _split_rows(lse, rows)
    groups = _head_groups(kernel, q, k)
    if len(groups) > 1:
        parts = [attention_forward(kernel, q[:, :, a:b].contiguous(), k[:, :, c:d].contiguous(),
                                   v[:, :, c:d].contiguous(), rule) for (a, b), (c, d) in groups]
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 1)
    if rule.spans is not None and not _packed_call(kernel, rule.spans):
        return _forward_by_piece(kernel, q, k, v, rule)
    if _needs_split(kernel, q, k, rule):
        return _forward_split(kernel, q, k, v, rule)
    if q.shape[2] != k.shape[2] and GQA not in kernel.features:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    return kernel.forward(q, k, v, rule)


def attention_backward(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       rule: Rule) -> Gradients:
    """Gradients of q, k and v from a saved pair (out, lse), which may be merged from several calls.

    Args as in `attention_forward`; dout and out are (B, T_q, H, D), lse is (B, H, T_q).
    """
    if rule.spans is not None and q.shape[0] > 1:
        rows = q.shape[0]
        flat = [_joined(x) for x in (dout, q, k, v, out)]
        grads = attention_backward(kernel, *flat, _join_rows(lse), rule.with_spans(rule.spans.repeat(rows)))
        dq, dk, dv = (grad.unflatten(1, (rows, -1)).squeeze(0) for grad in grads)
        return dq, dk, dv
    groups = _head_groups(kernel, q, k)
    if len(groups) > 1:
        return _backward_by_heads(kernel, groups, dout, q, k, v, out, lse, rule)
    if rule.spans is not None and not _packed_call(kernel, rule.spans):
        return _backward_by_piece(kernel, dout, q, k, v, out, lse, rule)
    if _needs_split(kernel, q, k, rule) or (kernel.splits_backward and _clipped(q, k, rule)):
        return _backward_split(kernel, dout, q, k, v, out, lse, rule)
    if q.shape[2] == k.shape[2] or GQA in kernel.features:
        return kernel.backward(dout, q, k, v, out, lse, rule)
    many = [x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v)]
    dq, dk, dv = kernel.backward(dout, q, *many, out, lse, rule)
    dk, dv = (_sum_groups(grad, k.shape[2]) for grad in (dk, dv))
    return dq, dk, dv


def _joined(x: Tensor) -> Tensor:
    return x.reshape(1, -1, *x.shape[2:])  # (B, T, H, D) -> (1, B T, H, D)


def _join_rows(lse: Tensor) -> Tensor:
    return lse.transpose(0, 1).reshape(1, lse.shape[1], -1)  # (B, H, T) -> (1, H, B T)


def _split_rows(lse: Tensor, rows: int) -> Tensor:
    return lse[0].unflatten(1, (rows, -1)).transpose(0, 1)  # (1, H, B T) -> (B, H, T)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, D) to (B, T, K, D): what the query heads of a group send to their kv head, added in wide precision."""
    return grad.unflatten(2, (kv_heads, -1)).sum(3, dtype=accumulator(grad.dtype)).to(grad.dtype)


def _packed_call(kernel: Kernel, spans: Spans) -> bool:
    return VARLEN in kernel.features and (spans.square or BOTTOM_RIGHT in kernel.features)


def _needs_split(kernel: Kernel, q: Tensor, k: Tensor, rule: Rule) -> bool:
    return rule.causal and rule.spans is None and q.shape[1] != k.shape[1] and BOTTOM_RIGHT not in kernel.features


def _clipped(q: Tensor, k: Tensor, rule: Rule) -> bool:
    return rule.causal and rule.window is None and rule.spans is None and q.shape[1] < k.shape[1]


def _head_groups(kernel: Kernel, q: Tensor, k: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of query heads and of their kv heads, each small enough for the kernel's index."""
    heads, kv_heads = q.shape[2], k.shape[2]
    most = max(q.numel() // heads, k.numel() // kv_heads)  # elements of one head
    at_once = max(1, min(heads, kernel.max_elements // max(1, most)))
    group = heads // kv_heads
    if at_once >= group:
        step = at_once // group
        return [((i * group, min(i + step, kv_heads) * group), (i, min(i + step, kv_heads)))
                for i in range(0, kv_heads, step)]
    return [((i, min(i + at_once, (i // group + 1) * group)), (i // group, i // group + 1))
            for j in range(kv_heads) for i in range(j * group, (j + 1) * group, at_once)]


def _backward_by_heads(kernel: Kernel, groups: list[tuple[tuple[int, int], tuple[int, int]]], dout: Tensor, q: Tensor,
                       k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    wide = accumulator(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for (a, b), (c, d) in groups:  # several groups of query heads may share one kv head: their shares add up
        part = attention_backward(kernel, *(x[:, :, a:b].contiguous() for x in (dout, q)),
                                  *(x[:, :, c:d].contiguous() for x in (k, v)), out[:, :, a:b].contiguous(),
                                  lse[:, a:b].contiguous(), rule)
        dq[:, :, a:b] = part[0]
        dk[:, :, c:d] += part[1]
        dv[:, :, c:d] += part[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _pieces(spans: Spans) -> list[tuple[slice, slice]]:
    """Query and key ranges of every piece that has queries."""
    edges = zip(spans.q, spans.q[1:], spans.k, spans.k[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in edges if b > a]


def _forward_by_piece(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    parts = [attention_forward(kernel, q[:, rows], k[:, keys], v[:, keys], rule.one_piece())
             for rows, keys in _pieces(rule.spans)]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 2)


def _backward_by_piece(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       rule: Rule) -> Gradients:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _pieces(rule.spans):
        dq[:, rows], dk[:, keys], dv[:, keys] = attention_backward(
            kernel, dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], rule.one_piece())
    return dq, dk, dv


def _forward_split(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Keys before the first query, all seen, and the causal square after them."""
    before, dtype = k.shape[1] - q.shape[1], q.dtype
    if q.device.type == "cpu":  # 16-bit types are no faster there: keep the parts unrounded
        q, k, v = (x.to(accumulator(dtype)) for x in (q, k, v))
    square, lse = attention_forward(kernel, q, k[:, before:], v[:, before:], rule)
    past, past_lse = attention_forward(kernel, q, k[:, :before], v[:, :before], rule.full())
    out, lse = square.to(accumulator(dtype)), lse.clone()
    merge_into(out, lse, past, past_lse)
    return out.to(dtype), lse


def _backward_split(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    rule: Rule) -> Gradients:
    before, dtype = k.shape[1] - q.shape[1], q.dtype
    if q.device.type == "cpu":
        dout, q, k, v, out = (x.to(accumulator(dtype)) for x in (dout, q, k, v, out))
    dq, dk, dv = attention_backward(kernel, dout, q, k[:, before:], v[:, before:], out, lse, rule)
    dq_past, dk_past, dv_past = attention_backward(kernel, dout, q, k[:, :before], v[:, :before], out, lse, rule.full())
    dk, dv = torch.cat([dk_past, dk], 1), torch.cat([dv_past, dv], 1)
    return (dq + dq_past).to(dtype), dk.to(dtype), dv.to(dtype)  # two parts are added exactly, then rounded once
