"""Errors of a low-precision attention against the same attention in float32.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention import AttentionContext, make_attention_context

NAMES = ("out", "dq", "dk", "dv")


def output_and_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Output of an attention, and the gradients of its inputs.

    Args:
        attend: A function of q (B, T, H, D), k and v (B, T, K, D) to the output (B, T, H, D).
        inputs: q, k and v; they are left as they are.
        dout: Gradient of the output, of its shape.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def exact_row(context: AttentionContext, row: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients of a whole row in float32 (float64 on a CPU), on this process alone, one kv head at a time.

    Args:
        context: Whose row it is (its documents count, its ranks and kernel do not).
        row: q (B, T, H, D), k, v (B, T, K, D) and the output gradient (B, T, H, D).
    """
    wide = torch.float64 if row[0].device.type == "cpu" else torch.float32
    group, parts = row[0].shape[2] // row[1].shape[2], []
    edges = None if context.boundaries is None else [edge for edge in context.boundaries if edge <= context.tokens]
    for head in range(row[1].shape[2]):
        kv = slice(head, head + 1)
        of_query = slice(kv.start * group, kv.stop * group)
        q, k, v, dout = (x[:, :, at].to(wide) for x, at in zip(row, (of_query, kv, kv, of_query)))
        whole = make_attention_context(context.tokens, boundaries=edges, heads=q.shape[2], kv_heads=k.shape[2])
        parts.append(output_and_gradients(whole.attend, (q, k, v), dout))
    return [torch.cat(column, 2) for column in zip(*parts)]


def relative_errors(
    context: AttentionContext, row: Sequence[Tensor], exact: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """Root-mean-square error over root-mean-square value, of output and gradients, over the whole row.

    Args:
        context: What computes the row.
        row: q, k, v and the output gradient of the whole row, the same on every process.
        exact: The result of `exact_row`, if it is there already.
    """
    exact = exact_row(context, row) if exact is None else exact
    *inputs, dout = (context.shard(x) for x in row)
    sums = torch.zeros(4, 2, dtype=torch.float64, device=dout.device)
    for i, (found, wanted) in enumerate(zip(output_and_gradients(context.attend, inputs, dout), exact)):
        mine = context.shard(wanted, pad=0)
        real = context.positions(dout.device)[0] < context.tokens
        sums[i, 0] = (found[:, real].to(mine.dtype) - mine[:, real]).double().square().sum()
        sums[i, 1] = mine[:, real].double().square().sum()
    if context.size > 1:
        for group in (context.inner, context.outer):
            if group is not None:
                dist.all_reduce(sums, group=group)
    return dict(zip(NAMES, (sums[:, 0] / sums[:, 1]).sqrt().tolist()))
