"""Backward passes, made of the calls that a kernel has: gradients of one call, and shares that add up over calls.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

A key that queries of several calls see gets its gradient in several shares. Rounding each share to bfloat16 before
they are added adds as much error as the one rounding of a single call: 1.2 times a good kernel's own error. So shares
are added to tensors of the accumulating type (float32; float64 for float64), by what each kernel can do:

* It adds its own float32 sums (flash-attn 4 on Hopper with grouped heads; the reference).
* Of grouped heads it rounds each query head's share and then their sum (`rounds_heads`: cuDNN, torch's flash,
  flash-attn 2). It is given repeated kv heads and the sum is taken here, so that the second rounding goes.
* 16-bit types on a CPU are computed in float32, which is no slower there.
* Otherwise (flash-attn 3; flash-attn 4 without grouped heads) each call's share is rounded once more.

Of packed rows few keys are seen by several calls, those of documents that were cut. `backward_with_shares` leaves the
others' gradients as one call gives them, which spares passes over tensors twice as wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralong.attention.kernels.base import GQA, Kernel, Share
from ultralong.attention.kernels.fallbacks import clipped, head_groups, joined, needs_split, packed_call
from ultralong.attention.kernels.pieces import each_piece
from ultralong.attention.lse_merge import accumulator
from ultralong.attention.spec import Rule, Spans

Gradients = tuple[Tensor, Tensor, Tensor]
Groups = list[tuple[tuple[int, int], tuple[int, int]]]


def attention_backward(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> Gradients:
    """Gradients of q, k and v from a saved pair (out, lse), which may be merged from several calls.

    Args as in `attention_forward`; dout and out are (B, T_q, H, D), lse is (B, H, T_q).
    """
    if rule.spans is not None and q.shape[0] > 1:
        rows = q.shape[0]
        flat = [joined(x) for x in (dout, q, k, v, out)]
        grads = attention_backward(kernel, *flat, _join_rows(lse), rule.with_spans(rule.spans.repeat(rows)))
        dq, dk, dv = (grad.unflatten(1, (rows, -1)).squeeze(0) for grad in grads)
        return dq, dk, dv
    groups = head_groups(kernel, q, k)
    if len(groups) > 1:
        dk, dv = (torch.zeros_like(x, dtype=accumulator(q.dtype)) for x in (k, v))
        dq = _add_by_heads(kernel, groups, dout, q, k, v, out, lse, rule, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    if rule.spans is not None and not packed_call(kernel, rule.spans):
        return _backward_by_piece(kernel, dout, q, k, v, out, lse, rule)
    if needs_split(kernel, q, k, rule) or (kernel.splits_backward and clipped(q, k, rule)):
        return _backward_split(kernel, dout, q, k, v, out, lse, rule)
    if q.shape[2] == k.shape[2] or GQA in kernel.features:
        return kernel.backward(dout, q, k, v, out, lse, rule)
    many = [x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v)]
    dq, dk, dv = kernel.backward(dout, q, *many, out, lse, rule)
    dk, dv = (_sum_groups(grad, k.shape[2]) for grad in (dk, dv))
    return dq, dk, dv


def add_backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """As `attention_backward`, but this call's shares of dK and dV are added to what is there.

    Args:
        kernel: Who computes.
        dout: (B, T_q, H, D).
        q: (B, T_q, H, D).
        k: (B, T_k, K, D).
        v: (B, T_k, K, D).
        out: (B, T_q, H, D), of the pair that may be merged from several calls.
        lse: (B, H, T_q), likewise.
        rule: Which keys are seen.
        dk: (B, T_k, K, D) in the accumulating type, changed in place; may be a slice.
        dv: (B, T_k, K, D), likewise.

    Returns:
        The gradient of q (B, T_q, H, D) in q's type.
    """
    if q.device.type == "cpu" and q.dtype != accumulator(q.dtype):
        wide = (x.to(dk.dtype) for x in (dout, q, k, v, out))
        return add_backward(kernel, *wide, lse, rule, dk, dv).to(q.dtype)
    if rule.spans is not None and q.shape[0] > 1:
        rows = [slice(i, i + 1) for i in range(q.shape[0])]
        return torch.cat(
            [add_backward(kernel, dout[i], q[i], k[i], v[i], out[i], lse[i], rule, dk[i], dv[i]) for i in rows]
        )
    groups = head_groups(kernel, q, k)
    if len(groups) > 1:
        return _add_by_heads(kernel, groups, dout, q, k, v, out, lse, rule, dk, dv)
    if rule.spans is not None and not packed_call(kernel, rule.spans):
        return _add_by_piece(kernel, dout, q, k, v, out, lse, rule, dk, dv)
    if needs_split(kernel, q, k, rule) or (kernel.splits_backward and clipped(q, k, rule)):
        return _add_split(kernel, dout, q, k, v, out, lse, rule, dk, dv)
    if q.shape[2] != k.shape[2] and (GQA not in kernel.features or kernel.rounds_heads):
        return _add_by_query_head(kernel, dout, q, k, v, out, lse, rule, dk, dv)
    return kernel.add_backward(dout, q, k, v, out, lse, rule, dk, dv)


def backward_with_shares(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, list[Share]]:
    """As `attention_backward`, but keys that other calls' queries see as well get shares that can be added up.

    Args as in `attention_backward`; which keys those are is in `rule.spans`, all of them without pieces.

    Returns:
        dq, dk, dv, and the shares. Where there is a share, dk and dv are not filled in: the sum of all calls' shares
        belongs there.
    """
    if _all_in_sums(kernel, q, k, rule.spans):
        wide = [torch.zeros_like(x, dtype=accumulator(q.dtype)) for x in (k, v)]
        dq = add_backward(kernel, dout, q, k, v, out, lse, rule, *wide)
        return dq, torch.empty_like(k), torch.empty_like(v), [(slice(0, k.shape[1]), *wide)]
    spans = rule.spans
    if packed_call(kernel, spans):
        return kernel.backward_with_shares(dout, q, k, v, out, lse, rule)
    (dq, dk, dv), shares = (torch.empty_like(x) for x in (q, k, v)), []

    def work(index: int, rows: slice, keys: slice) -> None:
        tensors = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows])
        if spans.is_shared(index):
            wide = [torch.zeros_like(x[:, keys], dtype=accumulator(q.dtype)) for x in (k, v)]
            dq[:, rows] = add_backward(kernel, *tensors, rule.one_piece(), *wide)
            shares.append((keys, *wide))
        else:
            dq[:, rows], dk[:, keys], dv[:, keys] = attention_backward(kernel, *tensors, rule.one_piece())

    each_piece(spans, q, work, spans.is_shared)
    return dq, dk, dv, shares


def _all_in_sums(kernel: Kernel, q: Tensor, k: Tensor, spans: Spans | None) -> bool:
    """Whether all keys of a call get shares: where others may see any, or the call is not one of final gradients."""
    if spans is None or spans.shared is None or q.shape[0] > 1:
        return True
    if len(head_groups(kernel, q, k)) > 1:  # several calls, whose sums of a kv head go across them
        return True
    if q.device.type == "cpu" and q.dtype != accumulator(q.dtype):  # computed in the wide type anyway
        return True
    grouped = packed_call(kernel, spans) and q.shape[2] != k.shape[2]
    return grouped and (GQA not in kernel.features or bool(kernel.rounds_heads and spans.shared))


def sums_at(shares: list[Share], place: slice) -> list[Tensor]:
    """The part of shares that belongs to a range of keys, dK and dV (B, n, K, D), to be read or added to.

    Raises:
        LookupError: No share holds the whole range.
    """
    for keys, *sums in shares:
        if keys.start <= place.start and place.stop <= keys.stop:
            return [x[:, place.start - keys.start : place.stop - keys.start] for x in sums]
    held = ", ".join(f"{keys.start} to {keys.stop}" for keys, *_ in shares) or "none"
    raise LookupError(f"keys {place.start} to {place.stop} have no share of their gradients; there are {held}")


def _join_rows(lse: Tensor) -> Tensor:
    return lse.transpose(0, 1).reshape(1, lse.shape[1], -1)  # (B, H, T) -> (1, H, B T)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, D) to (B, T, K, D): what the query heads of a group send to their kv head, added in wide precision."""
    return grad.unflatten(2, (kv_heads, -1)).sum(3, dtype=accumulator(grad.dtype)).to(grad.dtype)


def _backward_by_piece(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> Gradients:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def work(_: int, rows: slice, keys: slice) -> None:
        dq[:, rows], dk[:, keys], dv[:, keys] = attention_backward(
            kernel, dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], rule.one_piece()
        )

    each_piece(rule.spans, q, work)
    return dq, dk, dv


def _backward_split(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> Gradients:
    before, dtype = k.shape[1] - q.shape[1], q.dtype
    if q.device.type == "cpu":
        dout, q, k, v, out = (x.to(accumulator(dtype)) for x in (dout, q, k, v, out))
    dq, dk, dv = attention_backward(kernel, dout, q, k[:, before:], v[:, before:], out, lse, rule)
    dq_past, dk_past, dv_past = attention_backward(kernel, dout, q, k[:, :before], v[:, :before], out, lse, rule.full())
    dk, dv = torch.cat([dk_past, dk], 1), torch.cat([dv_past, dv], 1)
    return (dq + dq_past).to(dtype), dk.to(dtype), dv.to(dtype)  # two parts are added exactly, then rounded once


def _add_by_heads(
    kernel: Kernel,
    groups: Groups,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Groups of heads; several groups of query heads may share one kv head."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for (a, b), (c, d) in groups:
        dq[:, :, a:b] = add_backward(
            kernel,
            *(x[:, :, a:b].contiguous() for x in (dout, q)),
            *(x[:, :, c:d].contiguous() for x in (k, v)),
            out[:, :, a:b].contiguous(),
            lse[:, a:b].contiguous(),
            rule,
            dk[:, :, c:d],
            dv[:, :, c:d],
        )
    return dq


def _add_by_piece(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Piece by piece; keys that only this call's queries see have one share, which is rounded once either way."""
    dq, one = torch.empty_like(q), rule.one_piece()

    def work(index: int, rows: slice, keys: slice) -> None:
        tensors = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows])
        if rule.spans.is_shared(index):
            dq[:, rows] = add_backward(kernel, *tensors, one, dk[:, keys], dv[:, keys])
            return
        dq[:, rows], to_keys, to_values = attention_backward(kernel, *tensors, one)
        dk[:, keys] += to_keys
        dv[:, keys] += to_values

    each_piece(rule.spans, q, work)
    return dq


def _add_split(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """The causal square and the full rectangle before it: no key is in both."""
    before = k.shape[1] - q.shape[1]
    dq = add_backward(kernel, dout, q, k[:, before:], v[:, before:], out, lse, rule, dk[:, before:], dv[:, before:])
    past = add_backward(
        kernel, dout, q, k[:, :before], v[:, :before], out, lse, rule.full(), dk[:, :before], dv[:, :before]
    )
    return dq + past  # two parts are added exactly, then rounded once


def _add_by_query_head(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Kv heads repeated for their query heads, whose shares are added here."""
    many = [x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v)]  # (B, T_k, H, D)
    dq, *shares = kernel.backward(dout, q, *many, out, lse, rule)
    for total, share in zip((dk, dv), shares, strict=True):
        total += share.unflatten(2, (k.shape[2], -1)).sum(3, dtype=total.dtype)  # (B, T_k, K, D)
    return dq
