"""Blocks of queries against blocks of keys in FP8, for `Fp8Forward`: what is quantised, how, and what computes it.

Legend: B batch, T tokens, H query heads, K kv heads, G = H / K query heads per kv head, D head size (128), n queries.

The kernel is NVIDIA's for Hopper in `nvidia-cudnn-frontend` (`cudnn.block_sparse_attention`, Apache-2.0; after
SageAttention2, arXiv 2411.10958), given every block of keys: both products in FP8 (e4m3), output in bfloat16 and
log-sum-exp in float32. It wants a scale for each query, for each 16 keys and for each channel of the values.

* Keys lose their mean over the call first (SageAttention's smoothing): a channel that is large in every key takes
  most of e4m3's three bits of mantissa. A query's scores all change by the same number, which is added to its
  log-sum-exp.
* The query heads of a kv head are laid end to end as more queries, since every query sees every key of a block: the
  kernel knows no grouped heads.
* Hopper's FP8 products are added up with fewer bits than float32 has, and the loss grows with the keys of a call. So
  a call has `KEYS` keys at most, and calls are merged in float32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.lse_merge import merge_into

TILE = 128  # queries, and keys, of one block of the kernel
KEY_GROUP = 16  # keys that share a scale
LARGEST = 448.0  # of e4m3
QUERIES = 16384  # of one call
KEYS = 65536  # of one call at most
PACKAGE = "nvidia-cudnn-frontend"
OLDEST = (1, 32)  # has the Hopper kernel of 128 queries by 128 keys

# (q, q's scales, k, k's scales, v, v's scales, softmax scale) -> (out, lse); see `vendor_kernel`
BlockKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Fp8Keys:
    """Keys and values of one call, quantised.

    Attributes:
        k: (B, K, T, D) e4m3, without their mean.
        k_scale: (B, K, T / 16) float32.
        v: (B, K, D, T) e4m3.
        v_scale: (K, D) float32.
        mean: (B, K, D) float32, what was taken off the keys.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    mean: Tensor

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys from `start` to `stop`, multiples of `TILE`, as the kernel wants them: contiguous."""
        groups = slice(start // KEY_GROUP, stop // KEY_GROUP)
        return (
            self.k[:, :, start:stop].contiguous(),
            self.k_scale[:, :, groups].contiguous(),
            self.v[:, :, :, start:stop].contiguous(),
            self.v_scale,
        )


def quantise_keys(k: Tensor, v: Tensor) -> Fp8Keys:
    """Keys and values (B, T, K, D) for the kernel, T a multiple of `TILE`. A batch shares the scales of its values."""
    mean = k.mean(1, dtype=torch.float32)  # (B, K, D)
    batch, tokens, kv_heads, size = k.shape
    k8 = torch.empty(batch, kv_heads, tokens, size, dtype=torch.float8_e4m3fn, device=k.device)
    v8 = torch.empty(batch, kv_heads, size, tokens, dtype=torch.float8_e4m3fn, device=k.device)
    k_scale = torch.empty(batch, kv_heads, tokens // KEY_GROUP, dtype=torch.float32, device=k.device)
    v_scale = (v.abs().amax(1).amax(0).float() / LARGEST).clamp(min=1e-20)  # (K, D)
    for start in range(0, tokens, QUERIES):  # in float32 a piece at a time
        piece = slice(start, min(start + QUERIES, tokens))
        groups = slice(piece.start // KEY_GROUP, piece.stop // KEY_GROUP)
        keys = (k[:, piece].float() - mean[:, None]).transpose(1, 2).unflatten(2, (-1, KEY_GROUP))  # (B, K, g, 16, D)
        k_scale[:, :, groups] = (keys.abs().amax((3, 4)) / LARGEST).clamp(min=1e-20)
        scaled = keys / k_scale[:, :, groups, None, None]
        k8[:, :, piece] = scaled.flatten(2, 3).clamp_(-LARGEST, LARGEST).to(k8.dtype)
        values = v[:, piece].float() / v_scale
        v8[..., piece] = values.clamp_(-LARGEST, LARGEST).to(v8.dtype).permute(0, 2, 3, 1)
    return Fp8Keys(k8, k_scale, v8, v_scale, mean)


def quantise_queries(q: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Queries (B, n, H, D), n a multiple of `TILE`: (B, K, G n, D) e4m3 and their scales (B, K, G n) float32."""
    wide = q.float().unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, G n, D)
    scale = (wide.abs().amax(-1) / LARGEST).clamp(min=1e-20)
    q8 = (wide / scale.unsqueeze(-1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return q8.contiguous(), scale.contiguous()


def mean_scores(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """What the keys' mean (B, K, D) adds to every score of a query (B, n, H, D): (B, H, n) float32."""
    grouped = q.float().unflatten(2, (mean.shape[1], -1))  # (B, n, K, G, D)
    return torch.einsum("bnkgd,bkd->bkgn", grouped, mean).flatten(1, 2) * scale


def merge_keys(
    kernel: BlockKernel, out: Tensor, lse: Tensor, q: Tensor, keys: Fp8Keys, count: int, scale: float, most: int = KEYS
) -> None:
    """Let queries also see the first `count` keys, a block of at most `most` after the other.

    Args:
        kernel: Computes one block.
        out: (B, n, H, D) float32, what they saw so far; changed in place.
        lse: (B, H, n) float32, likewise; -inf where they saw nothing.
        q: (B, n, H, D), n a multiple of `TILE`.
        keys: The keys.
        count: A multiple of `TILE`.
        scale: Factor on q.k.
        most: Keys of one call, a multiple of `TILE`.
    """
    kv_heads = keys.k.shape[1]
    q8, q_scale = quantise_queries(q, kv_heads)
    shift = mean_scores(q, keys.mean, scale)
    calls = -(-count // most)
    edges = [round(call * count / TILE / calls) * TILE for call in range(calls + 1)]  # of one size
    for start, stop in pairwise(edges):
        part, part_lse = kernel(q8, q_scale, *keys.part(start, stop), scale)
        part = part.unflatten(2, (-1, q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, n, H, D)
        part_lse = part_lse.unflatten(2, (-1, q.shape[1])).flatten(1, 2) + shift
        merge_into(out, lse, part, part_lse)


def vendor_kernel() -> BlockKernel:
    """NVIDIA's kernel for Hopper.

    Returns:
        Attention of q (B, K, n, D) e4m3 with scales (B, K, n), k (B, K, m, D) with scales (B, K, m / 16) and v
        (B, K, D, m) with scales (K, D), n and m multiples of 128: output (B, K, n, D) bfloat16 and log-sum-exp
        (B, K, n) float32.

    Raises:
        ImportError: The package is missing or older than `OLDEST`, or lacks the function.
    """
    wanted = f"pip install '{PACKAGE}>={'.'.join(map(str, OLDEST))}'"
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"kernel 'flash4_fp8' is not installed: {wanted}") from error
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(f"kernel 'flash4_fp8' needs {PACKAGE} {'.'.join(map(str, OLDEST))}, found {found}: {wanted}")
    module: Any = importlib.import_module("cudnn.block_sparse_attention._interface")
    # The public function quantises by itself and gives no log-sum-exp, without which blocks of keys can't be merged.
    function = getattr(module, "_bsa_attn_fwd_sm90_fp8_blk128", None)
    if function is None:
        raise ImportError(f"{PACKAGE} {found} has no FP8 kernel of this form; 1.32 has: {wanted}")

    def kernel(
        q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, kv_heads, queries, _ = q.shape
        blocks = k.shape[2] // TILE
        every = torch.arange(blocks, dtype=torch.int32, device=q.device)
        index = every.expand(batch, kv_heads, queries // TILE, blocks)
        return function(q, k, v, q_scale, k_scale, v_scale, index, blocks, scale)

    return kernel
