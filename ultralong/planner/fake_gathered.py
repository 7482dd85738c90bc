"""Gathered keys that allocate what the real scheme does and compute nothing: for whole rows, on the rank with the most.

Legend: B batch, T tokens a rank holds, P ranks, N = P x T keys in front of the rank with the row's last tokens, H query
heads, K kv heads, D head size; s kv heads of a round, h their query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.gathered import BUFFER_BYTES


@dataclass(frozen=True)
class Gathered:
    """The zigzag layout's first rank: its first tokens see themselves, its last ones the whole row.

    Attributes:
        stages: Rounds of kv heads that were asked for; there are more where a round would be too large.
        ranks: That share the row.
    """

    stages: int
    ranks: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Any = None, sink: Any = None) -> tuple[Tensor, Tensor]:
        """Out (B, T, H, D) and lse (B, H, T)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
        group = q.shape[2] // k.shape[2]
        for heads, _front in self._rounds(k):
            for rows, _ in self._calls(q):
                part, statistic = _like(q, rows, heads * group), lse.new_empty((q.shape[0], heads * group, rows))
                del part, statistic
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rule: Any = None,
        sink: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v; a round's shares of others' keys leave, and those of its own come, in float32."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        group, under_way = q.shape[2] // k.shape[2], list[Tensor]()
        seen_by_others = (self.ranks - 1) * -(-q.shape[1] // 2)  # of its own tokens, by each of them half
        for heads, _front in self._rounds(k):
            totals = [_like(k, self.ranks * k.shape[1], heads, torch.float32) for _ in range(2)]
            part = _like(q, q.shape[1], heads * group)
            for rows, keys in self._calls(q):
                rounded = [_like(k, keys, heads) for _ in range(2)]
                sums = [
                    _like(q, rows, heads * group, torch.float32),
                    *(_like(k, keys, heads, torch.float32) for _ in range(2)),
                    lse.new_empty((q.shape[0], heads * group, rows)),
                ]
                piece = _like(q, rows, heads * group)
                del rounded, sums, piece
            del part
            landing = [_like(k, seen_by_others, heads, torch.float32) for _ in range(2)]
            under_way = [*totals, *landing]  # those of the round before are added up now
            del totals, landing
        del under_way
        return dq, dk, dv, None

    def _calls(self, q: Tensor) -> list[tuple[int, int]]:
        """Queries and keys of this rank's kernel calls."""
        first = -(-q.shape[1] // 2)
        return [(first, first), (q.shape[1] - first, self.ranks * q.shape[1])]

    def _rounds(self, k: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Kv heads of every round, with keys and values in front of the rank; the next round's are there too."""
        kv_heads, keys = k.shape[2], self.ranks * k.shape[1]
        size = 2 * k.shape[0] * keys * k.shape[3] * k.element_size()
        step = max(1, min(-(-kv_heads // self.stages), BUFFER_BYTES // max(1, size)))
        rounds = [min(step, kv_heads - first) for first in range(0, kv_heads, step)]
        coming = self._coming(k, rounds[0])
        for number, heads in enumerate(rounds, start=1):
            front, coming = coming[:2], []  # copies of what left are given up
            coming = self._coming(k, rounds[number]) if number < len(rounds) else []
            yield heads, front

    def _coming(self, k: Tensor, heads: int) -> list[Tensor]:
        """Where a round's keys and values arrive, and copies of what leaves unless it is all heads."""
        front = [_like(k, self.ranks * k.shape[1], heads) for _ in range(2)]
        leaving = [_like(k, -(-k.shape[1] // 2), heads) for _ in range(2 * (self.ranks - 1) * (heads < k.shape[2]))]
        return [*front, *leaving]


def _like(x: Tensor, tokens: int, heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, tokens, heads, D) of x's batch and head size."""
    return torch.empty((x.shape[0], tokens, heads, x.shape[3]), dtype=dtype or x.dtype, device=x.device)
