"""Attention written out with a full mask and torch.softmax: what every kernel and scheme is compared with."""

import torch


def visible(tokens_q, tokens_k, *, causal=True, window=None, edges_q=None, edges_k=None):
    """(T_q, T_k) booleans: which keys each query sees, from the definition alone."""
    at = torch.arange(tokens_q)[:, None] + tokens_k - tokens_q
    back = at - torch.arange(tokens_k)[None]
    seen = torch.ones(tokens_q, tokens_k, dtype=torch.bool)
    if edges_q is not None:
        rows = torch.bucketize(torch.arange(tokens_q), torch.tensor(edges_q[1:]), right=True)
        columns = torch.bucketize(torch.arange(tokens_k), torch.tensor(edges_k[1:]), right=True)
        seen = rows[:, None] == columns[None]
        # Inside piece i the last query lines up with the last key.
        back = (
            torch.tensor(edges_k)[rows + 1][:, None]
            - torch.tensor(edges_q)[rows + 1][:, None]
            + (torch.arange(tokens_q)[:, None] - torch.arange(tokens_k)[None])
        )
    if causal:
        seen = seen & (back >= 0)
    if window is not None:
        seen = seen & (back < window)
    return seen


def plain_attention(q, k, v, seen, *, scale=None, softcap=None, sink=None):
    """Output (B, T_q, H, D) and log-sum-exp (B, H, T_q) for q (B, T_q, H, D), k and v (B, T_k, K, D)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1)


def relative(found, expected):
    """Largest error over the largest expected value, or over 1 (the inputs' size) where what is expected cancels."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def random_qkv(seed, batch, tokens_q, tokens_k, heads, kv_heads, size, dtype=torch.float64):
    """q, k, v and an output gradient, from one seed."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(tokens_q, heads), (tokens_k, kv_heads), (tokens_k, kv_heads), (tokens_q, heads)]
    return [torch.randn(batch, t, h, size, generator=make, dtype=torch.float64).to(dtype) for t, h in shapes]
