"""What one kernel call computes: which keys a query sees and how a score is formed.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """Pieces of a packed row: piece i is queries `q[i]:q[i+1]` against keys `k[i]:k[i+1]`.

    Both start at 0 and end at the number of tokens of their side. A piece may have more keys than queries (its
    first keys come before the first query), never fewer.

    Attributes:
        q: Edges of the pieces among the queries.
        k: Edges of the pieces among the keys.
        shared: Pieces whose keys queries of other calls see too, so that their gradients are sums; None: any may be.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    shared: frozenset[int] | None = None
    _tensors: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert len(self.q) == len(self.k)
        assert self.q[0] == self.k[0] == 0

    @property
    def count(self) -> int:
        """Number of pieces."""
        return len(self.q) - 1

    @cached_property
    def max_q(self) -> int:
        """Queries of the longest piece."""
        return max(b - a for a, b in pairwise(self.q))

    @cached_property
    def max_k(self) -> int:
        """Keys of the longest piece."""
        return max(b - a for a, b in pairwise(self.k))

    @property
    def square(self) -> bool:
        """Whether every piece has as many keys as queries."""
        return self.q == self.k

    def is_shared(self, piece: int) -> bool:
        """Whether queries of other calls may see the keys of a piece."""
        return self.shared is None or piece in self.shared

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both lists as (N+1,) int32 tensors on a device, made once."""
        if device not in self._tensors:
            cu_q = torch.tensor(self.q, dtype=torch.int32, device=device)
            cu_k = cu_q if self.square else torch.tensor(self.k, dtype=torch.int32, device=device)
            self._tensors[device] = (cu_q, cu_k)
        return self._tensors[device]

    def repeat(self, times: int) -> Spans:
        """The same pieces for `times` rows laid end to end."""
        q = [a + row * self.q[-1] for row in range(times) for a in self.q[:-1]] + [times * self.q[-1]]
        k = [a + row * self.k[-1] for row in range(times) for a in self.k[:-1]] + [times * self.k[-1]]
        return Spans(tuple(q), tuple(k))


@dataclass(frozen=True, eq=False)
class Rule:
    """Which keys each query sees, and how its scores are formed.

    Attributes:
        scale: Factor on q.k (usually 1 / sqrt(D)).
        causal: The last query lines up with the last key (bottom-right aligned), so query i of T_q sees keys
            0 .. T_k - T_q + i. False: every key.
        spans: Pieces that see nothing of one another, or None for one piece.
        window: A query also sees no key further back than `window - 1` tokens (transformers' `sliding_window`).
        softcap: Scores become `softcap * tanh(score / softcap)`.
    """

    scale: float
    causal: bool = True
    spans: Spans | None = None
    window: int | None = None
    softcap: float | None = None

    def full(self) -> Rule:
        """The same scores with every key seen."""
        return replace(self, causal=False, spans=None)

    def one_piece(self) -> Rule:
        """The same rule inside one piece."""
        return replace(self, spans=None)

    def with_spans(self, spans: Spans | None) -> Rule:
        """The same rule over other pieces; one square or rectangular piece is no piece at all."""
        return replace(self, spans=spans if spans is not None and spans.count > 1 else None)
