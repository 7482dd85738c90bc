"""What may go into attention: each check names the value found and the rule.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_boundaries(boundaries: Tensor | Sequence[int], tokens: int) -> tuple[int, ...]:
    """Document boundaries as integers from 0 to the number of tokens.

    Args:
        boundaries: (N+1,) cumulative lengths: document i is `boundaries[i]:boundaries[i+1]`.
        tokens: Length of the row.

    Raises:
        ValueError: They are no integers, don't start at 0, don't rise, or don't end at `tokens`.
    """
    values = boundaries
    if isinstance(boundaries, Tensor):
        if boundaries.dim() != 1 or boundaries.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "boundaries must be a 1-dimensional int32 or int64 tensor, "
                f"found {boundaries.dtype} of shape {tuple(boundaries.shape)}"
            )
        values = boundaries.tolist()
    edges = tuple(int(value) for value in values)
    if edges != tuple(values):
        raise ValueError("boundaries must be whole numbers")
    if len(edges) < 2 or edges[0] != 0:
        raise ValueError(f"boundaries must begin with 0 and have at least 2 entries, found {edges[:4]}")
    for index in range(1, len(edges)):
        before, here = edges[index - 1], edges[index]
        if here <= before:
            raise ValueError(f"boundaries must rise, found {before} followed by {here} at entry {index}")
    if edges[-1] != tokens:
        raise ValueError(f"boundaries must end at the length {tokens}, found {edges[-1]}")
    return edges


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises ValueError where kv heads don't divide query heads."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"query heads must be a positive multiple of kv heads, found {heads} and {kv_heads}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, tokens: int, heads: int, kv_heads: int) -> None:
    """Types, devices and shapes of one call, against what the context was made for.

    Raises:
        ValueError: Names the tensor, what was found and what it must be.
    """
    for name, x, count in (("query", q, heads), ("key", k, kv_heads), ("value", v, kv_heads)):
        if x.dim() != 4 or x.shape[1:3] != (tokens, count):
            raise ValueError(
                f"{name} must be (batch, {tokens} local tokens, {count} heads, head size) for this "
                f"attention context, found {tuple(x.shape)}"
            )
        if x.dtype not in FLOATING:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, found {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"query, key and value must have one dtype, found {q.dtype} and {x.dtype} ({name})")
        if x.device != q.device:
            raise ValueError(f"query, key and value must be on one device, found {q.device} and {x.device} ({name})")
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"{name} must have the query's batch {q.shape[0]} and head size {q.shape[3]}, found {tuple(x.shape)}"
            )
