"""Attention specs: which keys a query sees and how a score is formed; and the checks of what goes into attention.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class VarlenSegments:
    """Segments of a packed (varlen) row: segment i is queries `q[i]:q[i+1]` against keys `k[i]:k[i+1]`.

    A segment sees nothing of the others. It may have more keys than queries (its first keys come before the first
    query), never fewer.

    Attributes:
        q: Cumulative sequence lengths of the queries, from 0.
        k: Cumulative sequence lengths of the keys, from 0.
        shared: Segments whose keys queries of other calls see too, so that their gradients are sums; None: any may be.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    shared: frozenset[int] | None = None
    _tensors: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _repeated: dict[int, VarlenSegments] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert len(self.q) == len(self.k)
        assert self.q[0] == self.k[0] == 0

    @property
    def count(self) -> int:
        """Number of segments."""
        return len(self.q) - 1

    @cached_property
    def max_seqlen_q(self) -> int:
        """Queries of the longest segment."""
        return max(b - a for a, b in pairwise(self.q))

    @cached_property
    def max_seqlen_k(self) -> int:
        """Keys of the longest segment."""
        return max(b - a for a, b in pairwise(self.k))

    @property
    def square(self) -> bool:
        """Whether every segment has as many keys as queries."""
        return self.q == self.k

    def is_shared(self, segment: int) -> bool:
        """Whether queries of other calls may see the keys of a segment."""
        return self.shared is None or segment in self.shared

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`q` and `k` as (N+1,) int32 tensors on a device, made once per device."""
        if device not in self._tensors:
            cu_q = torch.tensor(self.q, dtype=torch.int32, device=device)
            cu_k = cu_q if self.square else torch.tensor(self.k, dtype=torch.int32, device=device)
            self._tensors[device] = (cu_q, cu_k)
        return self._tensors[device]

    def repeat(self, times: int) -> VarlenSegments:
        """The same segments for `times` rows laid end to end, made once: every layer asks for them."""
        if times not in self._repeated:
            self._repeated[times] = self._laid_end_to_end(times)
        return self._repeated[times]

    def _laid_end_to_end(self, times: int) -> VarlenSegments:
        q = [a + row * self.q[-1] for row in range(times) for a in self.q[:-1]] + [times * self.q[-1]]
        k = [a + row * self.k[-1] for row in range(times) for a in self.k[:-1]] + [times * self.k[-1]]
        return VarlenSegments(tuple(q), tuple(k))


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Which keys each query sees, and how its scores are formed.

    Attributes:
        scale: Factor on q.k (usually 1 / sqrt(D)).
        causal: The last query lines up with the last key (bottom-right aligned), so query i of T_q sees keys
            0 .. T_k - T_q + i. False: every key.
        segments: Segments that see nothing of one another, or None for one segment.
        window: A query also sees no key further back than `window - 1` tokens (transformers' `sliding_window`).
        softcap: Scores become `softcap * tanh(score / softcap)`.
    """

    scale: float
    causal: bool = True
    segments: VarlenSegments | None = None
    window: int | None = None
    softcap: float | None = None

    def non_causal(self, window: int | None = None) -> AttentionSpec:
        """The same scores with every key seen, or all but those further back than a window."""
        return replace(self, causal=False, segments=None, window=window)

    def one_segment(self) -> AttentionSpec:
        """The same spec inside one segment."""
        return replace(self, segments=None)

    def with_segments(self, segments: VarlenSegments | None) -> AttentionSpec:
        """The same spec over other segments; a single segment is the same as None."""
        return replace(self, segments=segments if segments is not None and segments.count > 1 else None)


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


def check_anchors(anchors: Sequence[int], edges: Sequence[int] | None) -> None:
    """Refuse anchors that are no starts of documents, or do not rise.

    Raises:
        ValueError: Names them.
    """
    if edges is None:
        wrong = [anchor for anchor in anchors if anchor]
    else:
        wrong = sorted(set(anchors) - set(edges[:-1]))
    if wrong or list(anchors) != sorted(set(anchors)):
        raise ValueError(f"anchors must be rising starts of documents, found {list(anchors)[:8]}")


def check_heads(heads: int, kv_heads: int) -> None:
    """Check that kv heads divide query heads.

    Raises:
        ValueError: They don't.
    """
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
