"""Triton kernels of a decoding step: attention split over the cache, RoPE with the cache's write, norms, SwiGLU.

B sequences, H query heads, K kv heads, G = H / K, D head size, S splits of the cache, C its capacity, d hidden size.

Where a step stands in the sequence is read from a tensor on the GPU, `place` (3,) int64: the position of the token, the
tokens that this rank held before, and whether the new one is held here. So one CUDA graph serves every step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultralong.inference.decode_step.fp8_split import split_fp8
from ultralong.inference.decode_step.peer_merge import merge_at, merge_gathered
from ultralong.inference.kv_cache import LayerBuffer

__all__ = ["add_norm", "attend", "merge", "merge_at", "merge_gathered", "rotate_and_store", "silu_times"]
LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """How attention is split: keys of one step of a program, its warps, steps loaded ahead, programs a processor."""

    block: int
    warps: int
    stages: int
    programs: int


TUNING = Tuning(64, 4, 3, 2)
TUNING_FP8 = Tuning(64, 2, 3, 4)


@triton.jit
def _split(
    q_at, keys_at, values_at, place_at, out_at, lse_at, factor, capacity,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = H // K
    count = tl.load(place_at + 1) + tl.load(place_at + 2)
    blocks = tl.cdiv(count, BLOCK_N)
    start = (split * blocks // tl.num_programs(0) * BLOCK_N).to(tl.int32)
    stop = tl.minimum((split + 1) * blocks // tl.num_programs(0) * BLOCK_N, count).to(tl.int32)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    first = (batch * K + head).to(tl.int64) * capacity
    q = tl.load(
        q_at + (batch * H + head * group + rows[:, None]) * D + dims[None, :], mask=rows[:, None] < group, other=0.0
    )
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    for n in range(start, stop, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        held = tokens < stop
        places = first + tokens
        k = tl.load(keys_at + places[None, :] * D + dims[:, None], mask=held[None, :], other=0.0)  # (D, N)
        v = tl.load(values_at + places[:, None] * D + dims[None, :], mask=held[:, None], other=0.0)  # (N, D)
        scores = tl.dot(q, k) * factor
        scores = tl.where(held[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * old[:, None])
        top = new_top
    out = out / tl.maximum(total, 1e-30)[:, None]
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), -float("inf"))
    place = (split * tl.num_programs(2) + batch) * H + head * group + rows
    tl.store(out_at + place[:, None] * D + dims[None, :], out, mask=rows[:, None] < group)
    tl.store(lse_at + place, lse, mask=rows < group)


@triton.jit
def _merge(
    outs_at, lses_at, out_at, lse_at, parts, out_stride, lse_stride,
    D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, part, dims = tl.program_id(0), tl.arange(0, PARTS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = part < parts
    lse = tl.load(lses_at + part * lse_stride + row, mask=there, other=-float("inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    outs = tl.load(outs_at + part[:, None] * out_stride + row * D + dims[None, :], mask=there[:, None], other=0.0)
    out = tl.sum(outs * weights[:, None], 0) / tl.maximum(total, 1e-30)
    tl.store(out_at + row * D + dims, out.to(out_at.dtype.element_ty))
    tl.store(lse_at + row, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), -float("inf")))


@triton.jit
def _rotate_and_store(
    qkv_at, cos_at, sin_at, q_norm_at, k_norm_at, place_at, q_at, keys_at, values_at, key_scales_at, value_scales_at,
    capacity, epsilon,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORMS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = D // 2
    dims = tl.arange(0, half)
    source = qkv_at + (batch * (H + 2 * K) + head) * D
    a, b = tl.load(source + dims).to(tl.float32), tl.load(source + half + dims).to(tl.float32)
    if head < H + K:
        if NORMS:
            norm_at = q_norm_at if head < H else k_norm_at
            factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + epsilon)
            a = a * factor * tl.load(norm_at + dims).to(tl.float32)
            b = b * factor * tl.load(norm_at + half + dims).to(tl.float32)
        cos_a, cos_b = tl.load(cos_at + dims).to(tl.float32), tl.load(cos_at + half + dims).to(tl.float32)
        sin_a, sin_b = tl.load(sin_at + dims).to(tl.float32), tl.load(sin_at + half + dims).to(tl.float32)
        rotated = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = rotated
    if head < H:
        target = q_at + (batch * H + head) * D
        tl.store(target + dims, a.to(q_at.dtype.element_ty))
        tl.store(target + half + dims, b.to(q_at.dtype.element_ty))
    elif tl.load(place_at + 2) > 0:
        is_key = head < H + K
        kv_head = head - H if is_key else head - H - K
        place = (batch * K + kv_head).to(tl.int64) * capacity + tl.load(place_at + 1)
        cache_at = keys_at if is_key else values_at
        # What is kept was rounded to the model's type first, as where it is read by other kernels.
        a, b = a.to(qkv_at.dtype.element_ty).to(tl.float32), b.to(qkv_at.dtype.element_ty).to(tl.float32)
        if FP8:
            largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
            # frexp's exponent, less 8: see kv_cache.quantize_fp8
            exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126 - 8
            exponent = tl.minimum(tl.maximum(exponent, -100), 100)
            scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            a, b = a / scale, b / scale
            scales_at = key_scales_at if is_key else value_scales_at
            tl.store(scales_at + place, scale.to(scales_at.dtype.element_ty))
        tl.store(cache_at + place * D + dims, a.to(cache_at.dtype.element_ty))
        tl.store(cache_at + place * D + half + dims, b.to(cache_at.dtype.element_ty))


@triton.jit
def _add_norm(x_at, delta_at, weight_at, sum_at, out_at, epsilon, width, ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    row, dims = tl.program_id(0), tl.arange(0, BLOCK_D)
    inside = dims < width
    wide = tl.load(x_at + row * width + dims, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(delta_at + row * width + dims, mask=inside, other=0.0).to(tl.float32)
        x = wide.to(sum_at.dtype.element_ty)  # what is normalised is the rounded sum, as in the model's code
        tl.store(sum_at + row * width + dims, x, mask=inside)
        wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    weight = tl.load(weight_at + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + row * width + dims, (wide * factor * weight).to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _silu_times(gate_up_at, out_at, width, BLOCK_D: tl.constexpr):
    row, dims = tl.program_id(1), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = dims < width
    gate = tl.load(gate_up_at + row * 2 * width + dims, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_at + (row * 2 + 1) * width + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + row * width + dims, (gate / (1 + tl.exp(-gate)) * up).to(out_at.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Sum of x and delta (B, d), and its RMS norm times weight."""
    out, total = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _add_norm[(len(x),)](x, delta, weight, total, out, epsilon, x.shape[1], delta is not None, block, num_warps=8)
    return total, out


def silu_times(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up (B, I), of both in one row (B, 2 I)."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_times[(triton.cdiv(width, 1024), rows)](gate_up, out, width, 1024)
    return out


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor, float] | None, place: Tensor,
    buffers: list[LayerBuffer],
) -> Tensor:  # fmt: skip
    """Queries (B, H, D) after their norm and RoPE; keys and values go into the cache.

    Args:
        qkv: (B, (H + 2 K) D).
        cos: (D,).
        sin: (D,).
        norms: Weights of the norms of queries and keys, and epsilon, where the model has them.
        place: See on top.
        buffers: Keys and values of the layer.
    """
    keys, values = buffers
    kv_heads, capacity, size = keys.values.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q = qkv.new_empty(len(qkv), heads, size)
    q_norm, k_norm, epsilon = norms or (None, None, 0.0)
    _rotate_and_store[(heads + 2 * kv_heads, len(qkv))](
        qkv, cos, sin, q_norm, k_norm, place, q, keys.values, values.values, keys.scales, values.scales, capacity,
        epsilon, heads, kv_heads, size, norms is not None, keys.scales is not None, num_warps=1,
    )  # fmt: skip
    return q


def attend(
    q: Tensor, buffers: list[LayerBuffer], place: Tensor, scale: float, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query of each sequence to all that this rank holds.

    Args:
        q: (B, H, D).
        buffers: Keys and values of the layer.
        place: See on top.
        scale: Factor on scores.
        into: Where results are written, contiguous and in float32; by default they get memory of their own.

    Returns:
        (B, H, D) and the base-2 log-sum-exp (B, H), in float32; -inf where nothing is held.
    """
    keys, values = buffers
    batch, kv_heads, capacity, size = keys.values.shape
    heads, tuning = q.shape[1], TUNING if keys.scales is None else TUNING_FP8
    splits = _splits(q.device, batch * kv_heads, tuning.programs)
    outs = torch.empty(splits, batch, heads, size, dtype=torch.float32, device=q.device)
    lses = torch.empty(splits, batch, heads, dtype=torch.float32, device=q.device)
    grid, rows = (splits, kv_heads, batch), triton.next_power_of_2(heads // kv_heads)
    rest = place, outs, lses, scale * LOG2_E, capacity, heads, kv_heads, size
    if keys.scales is None:
        _split[grid](
            q, keys.values, values.values, *rest, max(16, rows), tuning.block,
            num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip
    else:
        pairs = (buffer.values.view(torch.int16) for buffer in buffers)
        split_fp8[grid](
            q, *pairs, keys.scales, values.scales, *rest, max(8, rows), tuning.block, _converts_fp8(q.device),
            num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip
    return merge(outs, lses, torch.float32, into)


def merge(
    outs: Tensor, lses: Tensor, dtype: torch.dtype, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Join parts (S, B, H, D) by their base-2 log-sum-exps (S, B, H): (B, H, D) of a type, and (B, H)."""
    parts, batch, heads, size = outs.shape
    out, lse = into or (
        torch.empty(batch, heads, size, dtype=dtype, device=outs.device),
        torch.empty(batch, heads, dtype=torch.float32, device=outs.device),
    )
    padded, width = triton.next_power_of_2(parts), min(size, 32)  # a program's part stays in registers
    _merge[(batch * heads, size // width)](
        outs, lses, out, lse, parts, outs.stride(0), lses.stride(0), size, padded, width, num_warps=4
    )
    return out, lse


def _converts_fp8(device: torch.device) -> bool:
    """Whether the GPU turns fp8 into float16 by an instruction: NVIDIA's from compute capability 8.9 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _splits(device: torch.device, rows: int, programs: int) -> int:
    """Parts of the cache, so that there are so many programs on each multiprocessor."""
    processors: Any = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, programs * processors // rows)
