"""The operations of `kernels` in torch, for any device and type: what the kernels are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ultralong.inference.kv_cache import LayerBuffer


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `kernels.add_norm`."""
    total = x if delta is None else x + delta
    return total, functional.rms_norm(total, total.shape[-1:], weight, epsilon)


def silu_times(gate_up: Tensor) -> Tensor:
    """See `kernels.silu_times`."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    place: Tensor,
    buffers: list[LayerBuffer],
) -> Tensor:
    """See `kernels.rotate_and_store`."""
    kv_heads, _, size = buffers[0].values.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (functional.rms_norm(x, (size,), weight, norms[2]) for x, weight in zip((q, k), norms[:2], strict=True))
    q, k = (x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin for x in (q, k))
    _, held, mine = place.tolist()
    if mine:
        for buffer, x in zip(buffers, (k, v), strict=True):
            buffer.write(held, x[:, None])
    return q


def attend(
    q: Tensor,
    buffers: list[LayerBuffer],
    place: Tensor,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend`."""
    _, held, mine = place.tolist()
    keys, values = (buffer.read(slice(held + mine), slice(None)) for buffer in buffers)  # (B, t, K, D)
    queries = q.unflatten(1, (keys.shape[2], -1))  # (B, K, G, D)
    scores = torch.einsum("bkgd,btkd->bkgt", queries, keys) * scale
    lse = scores.logsumexp(-1) if held + mine else scores.new_full(scores.shape[:3], -math.inf)
    out = torch.einsum("bkgt,btkd->bkgd", (scores - lse[..., None]).exp(), values)
    found = out.flatten(1, 2), lse.flatten(1, 2) / math.log(2)
    return found if into is None else (into[0].copy_(found[0]), into[1].copy_(found[1]))


def merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `kernels.merge`."""
    lse = torch.logsumexp(lses * math.log(2), 0)
    weights = (lses * math.log(2) - lse).exp().nan_to_num(0.0)
    return (outs * weights[..., None]).sum(0).to(dtype), lse / math.log(2)


def merge_gathered(parts: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """See `kernels.merge_gathered`."""
    count = shape.numel()
    return merge(parts[:, :count].unflatten(1, shape), parts[:, count:].unflatten(1, shape[:-1]), dtype)[0]
