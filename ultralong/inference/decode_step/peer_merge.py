"""The kernel that joins ranks' parts of attention, gathered here or read from the memory of several GPUs.

P ranks, B sequences, H query heads, D head size.

Both ways give equal bits because each element is computed alone: ranks come in their order, no sum runs over threads,
and products are rounded before they are added. A reduction over a tile would leave its order, and which products and
sums become one instruction, to the compiler's choice of a layout, which follows the addresses and the warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _start_of(parts_at, part, start, stride, PEERS: tl.constexpr):
    """Where a rank's part begins: behind an address in a table, or in one block with all the others."""
    if PEERS:
        at = tl.load(parts_at + part).to(tl.pointer_type(tl.float32)) + start
    else:
        at = parts_at + start + part * stride
    return at


@triton.jit
def _join(
    parts_at, out_at, start, stride, rows,
    D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    row, dims = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    # All loads are under way before the first is needed: those of another GPU take a microsecond or two.
    lses, outs = tl.tuple(()), tl.tuple(())
    for part in tl.static_range(PARTS):
        at = _start_of(parts_at, part, start, stride, PEERS)
        lses = lses + (tl.load(at + rows * D + row),)
        outs = outs + (tl.load(at + row * D + dims),)
    top = lses[0]
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, lses[part])
    top = tl.where(top == -float("inf"), 0.0, top)  # nobody holds a key
    total = tl.exp2(lses[0] - top)
    out = outs[0] * total
    for part in tl.static_range(1, PARTS):
        weight = tl.exp2(lses[part] - top)
        total += weight
        out += outs[part] * weight
    out = out / tl.maximum(total, 1e-30)
    tl.store(out_at + row * D + dims, out.to(out_at.dtype.element_ty))


def merge_at(pointers: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Join parts that lie in the memory of several GPUs, as (B, H, D) of a type.

    Args:
        pointers: (P,) addresses of float32 memory that this GPU can read.
        start: Elements before a part, which is (B, H, D) and behind it its base-2 log-sum-exps (B, H).
        shape: (B, H, D).
        dtype: Of the result.
    """
    return _launch(pointers, start, 0, shape, dtype, peers=True)


def merge_gathered(parts: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Join parts that lie in one block, as (B, H, D) of a type: to the bit what `merge_at` gives.

    Args:
        parts: (P, B H D + B H) in float32, each rank's results and behind them its base-2 log-sum-exps.
        shape: (B, H, D).
        dtype: Of the result.
    """
    return _launch(parts, 0, parts.stride(0), shape, dtype, peers=False)


def _grain(shape: torch.Size) -> int:
    return min(shape[-1] & -shape[-1], 32)  # a power of two that divides D


def _launch(
    parts: Tensor, start: int, stride: int, shape: torch.Size, dtype: torch.dtype, *, peers: bool, warps: int = 1
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=parts.device)
    rows, size, width = shape[:-1].numel(), shape[-1], _grain(shape)
    _join[(rows, size // width)](
        parts, out, start, stride, rows, size, len(parts), width, peers, num_warps=warps, enable_fp_fusion=False
    )
    return out
