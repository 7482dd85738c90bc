"""The reference kernel: attention in plain PyTorch operations, for any device and dtype.

Legend: B batch, T tokens, H query heads, K kv heads, G = H / K query heads per kv head, D head size.
Scores are formed for a tile of queries at a time, in float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, SOFTCAP, WINDOW, Kernel
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.spec import AttentionSpec

SCORES_AT_ONCE = 2**25


class Reference(Kernel):
    """Attention in plain PyTorch operations, exact and slow."""

    name = "reference"
    device = "any"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    features = frozenset({GQA, BOTTOM_RIGHT, WINDOW, SOFTCAP})
    head_sizes = (2**16, 1)

    def unsupported_reason(self, q: Tensor, spec: AttentionSpec) -> str | None:
        """Only a wrong type is refused: it runs everywhere."""
        return None if q.dtype in self.dtypes else f"it takes floating types, the tensors are {q.dtype}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Softmax of the scores, tile by tile of queries."""
        wide = accumulation_dtype(q.dtype)
        keys, values = k.to(wide), v.to(wide)
        outs, lses = [], []
        for start, stop in _tiles(q, k):
            scores, _ = _scores(q[:, start:stop].to(wide), keys, spec, start, q.shape[1])  # (B, K, G, t, T_k)
            lse = scores.logsumexp(-1)  # (B, K, G, t)
            out = torch.einsum("bkgts,bskd->btkgd", torch.exp(scores - lse.unsqueeze(-1)), values)
            outs.append(out.flatten(2, 3).to(q.dtype))  # (B, t, H, D)
            lses.append(lse.flatten(1, 2))  # (B, H, t)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By dS = P * (dP - sum_d dout * out), with P from the saved log-sum-exp."""
        wide, kv_heads = accumulation_dtype(q.dtype), k.shape[2]
        keys, values = k.to(wide), v.to(wide)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        delta = (dout.to(wide) * out.to(wide)).sum(-1).unflatten(2, (kv_heads, -1))  # (B, T, K, G)
        for start, stop in _tiles(q, k):
            queries = q[:, start:stop].to(wide)
            grad = dout[:, start:stop].to(wide).unflatten(2, (kv_heads, -1))  # (B, t, K, G, D)
            scores, slope = _scores(queries, keys, spec, start, q.shape[1])
            statistic = lse[:, :, start:stop].to(wide).unflatten(1, (kv_heads, -1)).unsqueeze(-1)  # (B, K, G, t, 1)
            p = torch.exp(scores - statistic)  # (B, K, G, t, T_k)
            dv += torch.einsum("bkgts,btkgd->bskd", p, grad)
            dp = torch.einsum("btkgd,bskd->bkgts", grad, values)
            ds = p * (dp - delta[:, start:stop].permute(0, 2, 3, 1).unsqueeze(-1)) * spec.scale
            ds = ds if slope is None else ds * slope
            dq[:, start:stop] = torch.einsum("bkgts,bskd->btkgd", ds, keys).flatten(2, 3).to(q.dtype)
            dk += torch.einsum("bkgts,btkgd->bskd", ds, queries.unflatten(2, (kv_heads, -1)))
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _tiles(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Query ranges whose scores fit in SCORES_AT_ONCE elements."""
    tile = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    return [(start, min(start + tile, q.shape[1])) for start in range(0, q.shape[1], tile)]


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, start: int, total_q: int) -> tuple[Tensor, Tensor | None]:
    """Masked scores (B, K, G, t, T_k) of queries from `start` on, and the soft cap's slope (None without one)."""
    queries = q.unflatten(2, (k.shape[2], -1))  # (B, t, K, G, D)
    scores = torch.einsum("btkgd,bskd->bkgts", queries, k) * spec.scale
    slope = None
    if spec.softcap:
        squashed = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * squashed, 1 - squashed**2
    if spec.causal or spec.window is not None:
        at = torch.arange(start, start + q.shape[1], device=q.device)[:, None] + k.shape[1] - total_q  # (t, 1)
        back = at - torch.arange(k.shape[1], device=q.device)[None, :]  # (t, T_k): how far behind the query
        seen = back >= 0 if spec.causal else torch.ones_like(back, dtype=torch.bool)
        seen = seen if spec.window is None else seen & (back < spec.window)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores, slope
