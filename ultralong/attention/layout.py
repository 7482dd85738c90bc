"""Who holds which tokens: pure functions of lengths and document boundaries, no communication.

Legend: B batch, T tokens, P ranks.

Each rank owns ranges of the padded row, as many tokens as every other, and holds them in rising order. Contiguous has
one range a rank. Zigzag has 2P equal chunks and gives rank r chunks r and 2P-1-r, so that causal work is equal.
`ultralong.attention.balance` finds ranges for packed rows whose documents don't see each other. Where a second level
splits each rank's tokens again (`inner`), member i holds the i-th contiguous part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

TokenRange = tuple[int, int]  # global positions [start, stop)


@dataclass(frozen=True)
class Layout:
    """Which token ranges of a row each rank holds.

    Attributes:
        tokens: Length of the row before padding.
        owned: For every rank its ranges, rising and apart; each rank has as many tokens.
        inner: Members of the second level; the global rank of member i of rank r is `r * inner + i`.
    """

    tokens: int
    owned: tuple[tuple[TokenRange, ...], ...]
    inner: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the first level."""
        return len(self.owned)

    @property
    def padded(self) -> int:
        """Length of the row after padding."""
        return self.held * self.ranks

    @property
    def held(self) -> int:
        """Tokens that a rank of the first level holds (all its members together)."""
        return sum(stop - start for start, stop in self.owned[0])

    @property
    def local(self) -> int:
        """Tokens that one process holds."""
        return self.held // self.inner

    @property
    def name(self) -> str:
        """contiguous, zigzag or balanced."""
        if self.owned == contiguous(self.padded, self.ranks).owned:
            return "contiguous"
        return "zigzag" if self.owned == zigzag(self.padded, self.ranks).owned else "balanced"

    def ranges(self, rank: int) -> tuple[TokenRange, ...]:
        """Global ranges that a first-level rank holds, rising and apart."""
        return self.owned[rank]

    def holders(self, lengths: Sequence[int]) -> list[int]:
        """Ranks that hold tokens of each stretch of the row, from the stretches' lengths."""
        edges = [0, *accumulate(lengths)]
        return [
            sum(any(a < stop and start < b for a, b in ranges) for ranges in self.owned)
            for start, stop in pairwise(edges)
        ]

    def positions(self, process: int) -> Tensor:
        """Global positions (T_local,) int64 of the tokens of a process; those at or past `tokens` are padding."""
        rank, member = divmod(process, self.inner)
        held = torch.cat([torch.arange(a, b) for a, b in self.ranges(rank)])
        return held[member * self.local : (member + 1) * self.local]

    def shard(self, x: Tensor, process: int, dim: int = 1, pad: float = 0) -> Tensor:
        """The tokens of one process, of a row that every process has whole.

        Args:
            x: Any tensor with `tokens` along `dim`.
            process: Whose tokens.
            dim: The token dimension.
            pad: Value of the tokens past the end.
        """
        if x.shape[dim] != self.tokens:
            raise ValueError(f"this row has {self.tokens} tokens, dimension {dim} of the tensor has {x.shape[dim]}")
        dim = dim % x.dim()
        rank, member = divmod(process, self.inner)
        skip, take, parts = member * self.local, self.local, []
        for start, stop in self.ranges(rank):
            a, b = start + min(skip, stop - start), stop
            skip -= a - start
            b = min(b, a + take)
            take -= b - a
            if b > a:
                parts.append(self._slice(x, a, b, dim, pad))
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def _slice(self, x: Tensor, start: int, stop: int, dim: int, pad: float) -> Tensor:
        real = max(0, min(stop, self.tokens) - start)
        part = x.narrow(dim, min(start, self.tokens), real)
        missing = stop - start - real
        return part if not missing else pad_tensor(part, [0, 0] * (x.dim() - 1 - dim) + [0, missing], value=pad)

    def restore(self, gathered: Tensor, dim: int = 1) -> Tensor:
        """The row in order and without padding, from the processes' tokens laid end to end along `dim`."""
        places, offset = {}, 0
        for start, stop in (each for own in self.owned for each in own):
            places[start] = (offset, stop - start)
            offset += stop - start
        if list(places) != sorted(places):
            gathered = torch.cat([gathered.narrow(dim, *places[start]) for start in sorted(places)], dim)
        return gathered.narrow(dim, 0, self.tokens)


def held(ranges: Sequence[TokenRange], start: int, stop: int) -> tuple[slice, ...]:
    """Where the tokens `start` to `stop - 1` of a row stand among those of these ranges, laid end to end."""
    found, offset = [], 0
    for first, last in ranges:
        low, high = max(first, start), min(last, stop)
        if low < high:
            found.append(slice(offset + low - first, offset + high - first))
        offset += last - first
    return tuple(found)


def merge_adjacent(ranges: Iterable[TokenRange]) -> tuple[TokenRange, ...]:
    """Ranges in rising order, adjacent ones merged."""
    found: list[TokenRange] = []
    for start, stop in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def in_chunks(tokens: int, chunk: int, owners: Iterable[Iterable[int]], inner: int = 1) -> Layout:
    """A layout of equal chunks, from every rank's chunks."""
    return Layout(tokens, tuple(merge_adjacent((i * chunk, (i + 1) * chunk) for i in own) for own in owners), inner)


def chunk_size(tokens: int, chunks: int, each: int, inner: int) -> int:
    """Tokens of a chunk: enough for the row, and such that `each` chunks split evenly over `inner` members."""
    if tokens < 1:
        raise ValueError(f"a row needs at least 1 token, found {tokens}")
    size = -(-tokens // chunks)
    while size * each % inner:
        size += 1
    return size


def contiguous(tokens: int, ranks: int, inner: int = 1) -> Layout:
    """One run of tokens a rank (Ulysses needs no balance: after its exchange everyone has the whole row)."""
    return in_chunks(tokens, chunk_size(tokens, ranks, 1, inner), ([rank] for rank in range(ranks)), inner)


def zigzag(tokens: int, ranks: int, inner: int = 1) -> Layout:
    """Chunks r and 2P-1-r to rank r: equal causal work when every token sees all before it."""
    owners = ((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    return in_chunks(tokens, chunk_size(tokens, 2 * ranks, 2, inner), owners, inner)
