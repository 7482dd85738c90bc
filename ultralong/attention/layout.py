"""Who holds which tokens: pure functions of lengths and document boundaries, no communication.

Legend: B batch, T tokens, P ranks.

The padded row is cut into equal chunks; each rank owns some of them and holds them in rising order. Contiguous has
one chunk a rank. Zigzag has 2P chunks and gives rank r chunks r and 2P-1-r, so that causal work is equal. Balanced
gives every rank as many chunks too, but by each chunk's own work, for packed rows whose documents don't see each
other. Where a second level splits each rank's tokens again (`inner`), member i holds the i-th contiguous part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

Piece = tuple[int, int]  # global positions [start, stop)


@dataclass(frozen=True)
class Layout:
    """Which chunks of a row each rank holds.

    Attributes:
        tokens: Length of the row before padding.
        chunk: Tokens of one chunk.
        owners: For every rank its chunks, rising; each rank has as many.
        inner: Members of the second level; the global rank of member i of rank r is `r * inner + i`.
    """

    tokens: int
    chunk: int
    owners: tuple[tuple[int, ...], ...]
    inner: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the first level."""
        return len(self.owners)

    @property
    def padded(self) -> int:
        """Length of the row after padding."""
        return self.chunk * sum(len(own) for own in self.owners)

    @property
    def held(self) -> int:
        """Tokens that a rank of the first level holds (all its members together)."""
        return self.chunk * len(self.owners[0])

    @property
    def local(self) -> int:
        """Tokens that one process holds."""
        return self.held // self.inner

    @property
    def name(self) -> str:
        """contiguous, zigzag or balanced."""
        if self.owners == _contiguous(self.ranks):
            return "contiguous"
        return "zigzag" if self.owners == _zigzag(self.ranks) else "balanced"

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Global ranges that a first-level rank holds, neighbours joined, rising."""
        joined: list[Piece] = []
        for index in self.owners[rank]:
            start, stop = index * self.chunk, (index + 1) * self.chunk
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return tuple(joined)

    @cached_property
    def chunk_order(self) -> tuple[int, ...]:
        """For each chunk of the row, its place when the ranks' tokens are laid end to end."""
        place = {index: at for at, index in enumerate(index for own in self.owners for index in own)}
        return tuple(place[index] for index in range(len(place)))

    def positions(self, process: int) -> Tensor:
        """Global positions (T_local,) int64 of the tokens of a process; those at or past `tokens` are padding."""
        rank, member = divmod(process, self.inner)
        held = torch.cat([torch.arange(a, b) for a, b in self.pieces(rank)])
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
        for start, stop in self.pieces(rank):
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
        if self.owners != _contiguous(self.ranks):
            order = torch.tensor(self.chunk_order, device=gathered.device)
            gathered = gathered.unflatten(dim, (-1, self.chunk)).index_select(dim, order).flatten(dim, dim + 1)
        return gathered.narrow(dim, 0, self.tokens)


def _contiguous(ranks: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank,) for rank in range(ranks))


def _zigzag(ranks: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))


def _chunk(tokens: int, chunks: int, each: int, inner: int) -> int:
    """Tokens of a chunk: enough for the row, and such that `each` chunks split evenly over `inner` members."""
    if tokens < 1:
        raise ValueError(f"a row needs at least 1 token, found {tokens}")
    size = -(-tokens // chunks)
    while size * each % inner:
        size += 1
    return size


def contiguous(tokens: int, ranks: int, inner: int = 1) -> Layout:
    """One run of tokens a rank (Ulysses needs no balance: after its exchange everyone has the whole row)."""
    return Layout(tokens, _chunk(tokens, ranks, 1, inner), _contiguous(ranks), inner)


def zigzag(tokens: int, ranks: int, inner: int = 1) -> Layout:
    """Chunks r and 2P-1-r to rank r: equal causal work when every token sees all before it."""
    return Layout(tokens, _chunk(tokens, 2 * ranks, 2, inner), _zigzag(ranks), inner)


def work(start: int, stop: int, boundaries: Sequence[int]) -> int:
    """Query-key pairs of the queries [start, stop): each sees its document's tokens up to itself."""
    edges = np.asarray(boundaries, dtype=np.int64)
    first, last = np.searchsorted(edges, start, "right") - 1, np.searchsorted(edges, stop, "left")
    begin = edges[first:last]
    a = np.maximum(begin, start) - begin
    b = np.minimum(edges[first + 1 : last + 1], stop) - begin
    return int(((a + 1 + b) * (b - a) // 2).sum())


def imbalance(layout: Layout, boundaries: Sequence[int]) -> float:
    """Work of the busiest rank over the mean of all: 1.0 is perfect, the speed is divided by it."""
    totals = [sum(work(a, b, boundaries) for a, b in layout.pieces(rank)) for rank in range(layout.ranks)]
    return max(totals) * layout.ranks / sum(totals)


def balanced(tokens: int, ranks: int, boundaries: Sequence[int], inner: int = 1, smallest: int = 1024,
             good_enough: float = 1.03) -> Layout:
    """The layout of least imbalance for packed documents that don't see each other.

    Zigzag is tried first, then 2, 4, 8 and 16 chunks a rank dealt out by work (heaviest chunk first, to the rank with
    the least so far that still has room). The first one that is `good_enough` is taken, else the best.

    Args:
        tokens: Length of the row.
        ranks: Ranks of the first level.
        boundaries: Document boundaries from 0 to `tokens`.
        inner: Members of the second level.
        smallest: No chunk becomes smaller than this by choice (small chunks are slow).
        good_enough: Imbalance to stop at.
    """
    best = zigzag(tokens, ranks, inner)
    best_value = imbalance(best, _closed(boundaries, best.padded))
    for each in (2, 4, 8, 16):
        if best_value <= good_enough or (each > 2 and tokens < ranks * each * smallest):
            break
        chunk = _chunk(tokens, ranks * each, each, inner)
        layout = Layout(tokens, chunk, _dealt(chunk, ranks, each, _closed(boundaries, chunk * ranks * each)), inner)
        value = imbalance(layout, _closed(boundaries, layout.padded))
        if value < best_value:
            best, best_value = layout, value
    return best


def _closed(boundaries: Sequence[int], padded: int) -> tuple[int, ...]:
    """Boundaries with the padding as one more document."""
    edges = tuple(boundaries)
    return edges if edges[-1] == padded else (*edges, padded)


def _dealt(chunk: int, ranks: int, each: int, boundaries: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    costs = [work(i * chunk, (i + 1) * chunk, boundaries) for i in range(ranks * each)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in sorted(range(ranks * each), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < each), key=lambda r: (totals[r], r))
        hands[rank].append(index)
        totals[rank] += costs[index]
    return tuple(tuple(sorted(hand)) for hand in hands)
