"""The kernel that joins parts of attention which lie in the memory of several GPUs.

P GPUs, B sequences, H query heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_at(
    pointers_at, out_at, start, parts, rows, D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, part, dims = tl.program_id(0), tl.arange(0, PARTS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = part < parts
    at = tl.load(pointers_at + part, mask=there, other=0).to(tl.pointer_type(tl.float32)) + start
    lse = tl.load(at + rows * D + row, mask=there, other=-float("inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    outs = tl.load(at[:, None] + row * D + dims[None, :], mask=there[:, None], other=0.0)
    out = tl.sum(outs * weights[:, None], 0) / tl.maximum(total, 1e-30)
    tl.store(out_at + row * D + dims, out.to(out_at.dtype.element_ty))


def merge_at(pointers: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Join parts that lie in the memory of several GPUs, as (B, H, D) of a type.

    Args:
        pointers: (P,) addresses of float32 memory that this GPU can read.
        start: Elements before a part, which is (B, H, D) and behind it its base-2 log-sum-exps (B, H).
        shape: (B, H, D).
        dtype: Of the result.
    """
    out = torch.empty(shape, dtype=dtype, device=pointers.device)
    rows, size, width = shape[:-1].numel(), shape[-1], min(shape[-1], 32)
    _merge_at[(rows, size // width)](
        pointers, out, start, len(pointers), rows, size, triton.next_power_of_2(len(pointers)), width, num_warps=1
    )
    return out
