"""Attention of one query to an fp8 cache, split over the whole GPU (Triton).

B sequences, H query heads, K kv heads, G = H / K, D head size, S splits of the cache, C its capacity, N tokens a block.

Three things keep fp8 from being read as fast as memory allows, and are avoided here. Tensor cores take values of two
tokens in one register, which from bytes in shared memory is a load for each byte: two neighbours of a token are read as
one 16-bit number, which `ldmatrix` transposes, and even and odd dimensions are multiplied apart. Scales of 2 bytes a
token are too narrow for copies that run ahead: those of the next block are loaded while this one is computed. And
products whose rows are queries have 12 of 16 rows empty: here tokens are the rows, and queries 8 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 16-bit numbers of two tokens in one register; bytes of both, even ones first, become two float16 each.
EVEN = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $1, $1, 0x3120; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; }"
)
ODD = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $1, $1, 0x3120; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, b; }"
)


@triton.jit
def _unpack(x, ASM: tl.constexpr):
    """The first and the second fp8 of each 16-bit number, as float16; without ASM 2^-8 times as large."""
    if ASM:
        even = tl.inline_asm_elementwise(EVEN, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
        odd = tl.inline_asm_elementwise(ODD, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:  # the same bits, 4 of exponent in place of 5
        even = (((x << 8) & -32768) | ((x << 7) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
        odd = ((x & -32768) | ((x >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
    return even, odd


@triton.jit
def _power(x, ASM: tl.constexpr):
    """2^x, or 0 where that is too small to be a normal float32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def split_fp8(
    q_at, keys_at, values_at, key_scales_at, value_scales_at, place_at, out_at, lse_at, factor, capacity,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
) -> None:  # fmt: skip
    """See `kernels.attend`; keys and values (B, K, C, D / 2) are 16-bit views, COLUMNS is G or more and 8 or more."""
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = H // K
    half: tl.constexpr = D // 2
    count = tl.load(place_at + 1) + tl.load(place_at + 2)
    blocks = tl.cdiv(count, BLOCK_N)
    start = (split * blocks // tl.num_programs(0) * BLOCK_N).to(tl.int32)
    stop = tl.minimum((split + 1) * blocks // tl.num_programs(0) * BLOCK_N, count).to(tl.int32)
    columns, dims, lanes = tl.arange(0, COLUMNS), tl.arange(0, half), tl.arange(0, BLOCK_N)
    first = (batch * K + head).to(tl.int64) * capacity
    keys_at += first * half
    values_at += first * half
    key_scales_at += first
    value_scales_at += first
    q_from = q_at + (batch * H + head * group + columns[None, :]) * D + 2 * dims[:, None]  # (D / 2, G)
    q0 = tl.load(q_from, mask=columns[None, :] < group, other=0.0).to(tl.float32)
    q1 = tl.load(q_from + 1, mask=columns[None, :] < group, other=0.0).to(tl.float32)
    # A power of two brings queries into float16's range without rounding.
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(q0), 0), tl.max(tl.abs(q1), 0)), 1e-20)
    largest = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    q0, q1 = (q0 / largest[None, :]).to(tl.float16), (q1 / largest[None, :]).to(tl.float16)
    of_columns = largest * factor * (1.0 if ASM else 256.0)
    top = tl.full([COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    out0 = tl.zeros([half, COLUMNS], tl.float32)
    out1 = tl.zeros([half, COLUMNS], tl.float32)
    k_scale = tl.load(key_scales_at + start + lanes, mask=start + lanes < stop, other=0.0)
    v_scale = tl.load(value_scales_at + start + lanes, mask=start + lanes < stop, other=0.0)
    for n in range(start, stop, BLOCK_N):
        tokens = n + lanes
        held = tokens < stop
        k = tl.load(keys_at + tokens[:, None] * half + dims[None, :], mask=held[:, None], other=0)  # (N, D / 2)
        v = tl.load(values_at + tokens[None, :] * half + dims[:, None], mask=held[None, :], other=0)  # (D / 2, N)
        ahead = tokens + BLOCK_N
        next_k_scale = tl.load(key_scales_at + ahead, mask=ahead < stop, other=0.0)
        next_v_scale = tl.load(value_scales_at + ahead, mask=ahead < stop, other=0.0)
        # The scale of a value is a power of two: its exponent joins the score, and leaves the sum of weights again.
        exponent = v_scale.to(tl.int16, bitcast=True).to(tl.int32) >> 7
        raise_by = tl.where(held, (exponent - 127).to(tl.float32), -float("inf"))
        k0, k1 = _unpack(k, ASM)
        scores = tl.dot(k1, q1, tl.dot(k0, q0)) * of_columns[None, :] * k_scale.to(tl.float32)[:, None]
        scores += raise_by[:, None]  # (N, G)
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = _power(scores - (new_top - 12.0)[None, :], ASM)  # 2^12 keeps small ones float16's normal numbers
        old = _power(top - new_top, ASM)
        total = total * old + tl.sum(weights * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None], 0)
        v0, v1 = _unpack(v, ASM)
        out0 = tl.dot(v0, weights.to(tl.float16), out0 * old[None, :])
        out1 = tl.dot(v1, weights.to(tl.float16), out1 * old[None, :])
        top = new_top
        k_scale, v_scale = next_k_scale, next_v_scale
    by = (1.0 if ASM else 256.0) / tl.maximum(total, 1e-30)
    place = (split * tl.num_programs(2) + batch) * H + head * group + columns
    out_from = out_at + place[None, :] * D + 2 * dims[:, None]
    tl.store(out_from, out0 * by[None, :], mask=columns[None, :] < group)
    tl.store(out_from + 1, out1 * by[None, :], mask=columns[None, :] < group)
    lse = tl.where(total > 0, top - 12.0 + tl.log2(tl.maximum(total, 1e-30)), -float("inf"))
    tl.store(lse_at + place, lse, mask=columns < group)
