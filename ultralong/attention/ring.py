"""Ring: queries stay, keys and values go round; partial results are joined by their log-sum-exp.

Legend: B batch, T tokens a rank holds, P ranks, H query heads, K kv heads, D head size.

Ring attention (arXiv 2310.01889) over the zigzag layout. While a rank computes with one block of K and V, the next one
comes. Output, log-sum-exp and all gradients are added in float32; the backward pass uses the joined pair, so that
every block's share of the gradients simply adds up; what other ranks add to a block's dK and dV travels one hop behind
the block and comes home after P - 1 hops.

Documents that don't see each other need no equal lengths here: two pieces of the row share at most one document (the
one in which the earlier piece ends), so what a block adds to a piece is at most one full rectangle, never a mask. And
only that document's keys and values travel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Pending, copy_rows, pass_on
from ultralong.attention.kernels import Kernel, Share, add_backward, attention_forward, backward_with_shares, sums_at
from ultralong.attention.layout import Layout, Piece
from ultralong.attention.lse_merge import accumulator, merged
from ultralong.attention.partial_rows import Parts
from ultralong.attention.scheme import Gradients, Pair, Scheme
from ultralong.attention.spec import Rule, Spans

Rectangle = tuple[slice, slice]  # local query rows, keys of the block; every row sees every key


def own_spans(pieces: Sequence[Piece], boundaries: Sequence[int]) -> Spans | None:
    """Documents among a rank's own tokens: pieces of one document count as one run, since both are in order."""
    held: dict[Piece, int] = {}  # tokens by document, in order
    for start, stop in pieces:
        at = start
        while at < stop:
            document = _document(boundaries, at)
            end = min(stop, document[1])
            held[document] = held.get(document, 0) + end - at
            at = end
    cuts = (0, *accumulate(held.values()))
    shared = frozenset(i for i, ((start, stop), count) in enumerate(held.items()) if count < stop - start)
    return Spans(cuts, cuts, shared) if len(held) > 1 else None


def travelling(pieces: Sequence[Piece], end: int, boundaries: Sequence[int] | None) -> list[Piece]:
    """Which of a rank's tokens other ranks see: of each piece the document that goes on after it.

    Args:
        pieces: Global ranges that the rank holds; what follows one is another rank's.
        end: End of the row.
        boundaries: Document boundaries when documents don't see each other, else None.
    """
    found = []
    for start, stop in pieces:
        begin, finish = (0, end) if boundaries is None else _document(boundaries, stop - 1)
        if finish > stop:
            found.append((max(start, begin), stop))
    return found


def rectangles(mine: Sequence[Piece], theirs: Sequence[Piece], boundaries: Sequence[int] | None) -> list[Rectangle]:
    """What a rank's tokens see of another rank's: full rectangles, neighbours joined.

    Args:
        mine: Global ranges of the queries.
        theirs: Global ranges of the keys; none overlaps `mine`.
        boundaries: Document boundaries when documents don't see each other, else None.
    """
    found: list[tuple[int, int, int, int]] = []
    row = 0
    for start, stop in mine:
        column = 0
        for first, end in theirs:
            if first < start:
                begin, finish = (0, stop) if boundaries is None else _document(boundaries, end - 1)
                if finish > start:
                    found.append(
                        (row, row + min(stop, finish) - start, column + max(first, begin) - first, column + end - first)
                    )
            column += end - first
        row += stop - start
    return [(slice(a, b), slice(c, d)) for a, b, c, d in _joined(found)]


def _apart(a: slice, b: slice) -> bool:
    return a.stop <= b.start or b.stop <= a.start


def _document(boundaries: Sequence[int], position: int) -> Piece:
    at = bisect_right(boundaries, position)
    return boundaries[at - 1], boundaries[at]


def _joined(found: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Join rectangles that share their rows and touch in their keys, or the other way round, until none is left."""
    for i, (a, b, c, d) in enumerate(found):
        for j, (e, f, g, h) in enumerate(found):
            if (a, b) == (e, f) and d == g:
                joined = (a, b, c, h)
            elif (c, d) == (g, h) and b == e:
                joined = (a, f, c, d)
            else:
                continue
            return _joined([joined, *(r for n, r in enumerate(found) if n not in (i, j))])
    return sorted(found)


@dataclass(frozen=True, eq=False)
class Ring(Scheme):
    """Attention of a rank's queries with keys and values that go round.

    Attributes:
        group: The ranks of the ring.
        layout: Which tokens each holds.
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None

    @cached_property
    def rank(self) -> int:
        """This process's place in the ring."""
        return dist.get_rank(self.group)

    @cached_property
    def own(self) -> Spans | None:
        """Documents among this rank's own tokens."""
        return None if self.boundaries is None else own_spans(self.layout.pieces(self.rank), self.boundaries)

    @cached_property
    def _rows(self) -> list[slice]:
        """Which queries see other ranks' tokens, ranges apart: their results are sums, all others are done at once."""
        found: list[slice] = []
        for rows in sorted((rows for seen in self.blocks for rows, _ in seen), key=lambda rows: rows.start):
            if found and rows.start <= found[-1].stop:
                found[-1] = slice(found[-1].start, max(found[-1].stop, rows.stop))
            else:
                found.append(rows)
        return found

    @cached_property
    def _once(self) -> bool:
        """Whether every query's results are of two parts at most: joined in their own type they round no more."""
        rows = [rows for seen in self.blocks for rows, _ in seen]
        return self.layout.ranks == 2 and all(_apart(a, b) for a, b in combinations(rows, 2))

    def _wide(self, q: Tensor) -> torch.dtype:
        """The type in which results of several parts are kept until all have come."""
        return q.dtype if self._once else accumulator(q.dtype)

    @cached_property
    def _sources(self) -> list[list[Piece]]:
        """What travels of each rank's tokens, by hops behind this rank (0: this rank's own)."""
        ranks = [(self.rank - hop) % self.layout.ranks for hop in range(self.layout.ranks)]
        return [travelling(self.layout.pieces(rank), self.layout.padded, self.boundaries) for rank in ranks]

    @cached_property
    def _leaving(self) -> list[slice]:
        """Where this rank holds its own travelling tokens."""
        found, offset = [], 0
        for start, stop in self.layout.pieces(self.rank):
            found += [slice(offset + a - start, offset + b - start) for a, b in self._sources[0] if start <= a < stop]
            offset += stop - start
        return found

    @cached_property
    def blocks(self) -> list[list[Rectangle]]:
        """For every hop but the first, what this rank sees of the block that has come."""
        mine = self.layout.pieces(self.rank)
        return [rectangles(mine, pieces, self.boundaries) for pieces in self._sources[1:]]

    def _block(self, k: Tensor, v: Tensor) -> Tensor:
        """This rank's travelling keys and values, (2, B, N, K, D)."""
        block = k.new_empty((2, k.shape[0], _length(self._sources[0]), *k.shape[2:]))
        for side, x in zip(block, (k, v), strict=True):
            offset = 0
            for at in self._leaving:
                copy_rows(side[:, offset : offset + at.stop - at.start], x[:, at])
                offset += at.stop - at.start
        return block

    def _next(self, x: Tensor, hop: int, tag: int = 0) -> Pending:
        """Pass on a block, or what belongs to it; the one that comes has come `hop` hops."""
        tokens = _length(self._sources[hop % self.layout.ranks])
        return pass_on(x, self.group, tag, (*x.shape[:2], tokens, *x.shape[3:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """The pair's lse is (B, H, T)."""
        coming = self._next(self._block(k, v), 1)
        out, lse = attention_forward(self.kernel, q, k, v, rule.with_spans(self.own))
        sums, lse = Parts(out, self._rows, self._wide(q)), lse.contiguous()
        for hop, seen in enumerate(self.blocks, start=1):
            block = coming.wait()
            coming = self._next(block, hop + 1) if hop < len(self.blocks) else None
            for rows, keys in seen:
                part, part_lse = attention_forward(
                    self.kernel, q[:, rows], block[0][:, keys], block[1][:, keys], rule.full()
                )
                sums.put(rows, merged(sums.at(rows), lse[:, :, rows], part, part_lse))
        return sums.whole(), lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, *, wide: bool = False
    ) -> Gradients:
        """The blocks go round once more; their gradients follow one hop behind."""
        coming, behind = self._next(self._block(k, v), 1), None
        own = rule.with_spans(self.own)
        if wide:
            dk, dv = (torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (k, v))
            dq = add_backward(self.kernel, dout, q, k, v, out, lse, own, dk, dv)
            shares = [(slice(0, k.shape[1]), dk, dv)]
        else:
            dq, dk, dv, shares = backward_with_shares(self.kernel, dout, q, k, v, out, lse, own)
        sums = Parts(dq, self._rows, self._wide(q))
        for hop, seen in enumerate(self.blocks, start=1):
            block = coming.wait()
            coming = self._next(block, hop + 1) if hop < len(self.blocks) else None
            share = torch.zeros_like(block, dtype=accumulator(k.dtype))
            for rows, keys in seen:
                sums.at(rows).add_(
                    add_backward(
                        self.kernel,
                        dout[:, rows],
                        q[:, rows],
                        block[0][:, keys],
                        block[1][:, keys],
                        out[:, rows],
                        lse[:, :, rows],
                        rule.full(),
                        share[0][:, keys],
                        share[1][:, keys],
                    )
                )
            if behind is not None:
                share += behind.wait()
            behind = self._next(share, hop + 1, tag=1)
        self._take_home(behind.wait(), shares)
        for keys, to_keys, to_values in () if wide else shares:
            dk[:, keys], dv[:, keys] = to_keys, to_values
        return sums.whole(), dk, dv

    def _take_home(self, share: Tensor, shares: list[Share]) -> None:
        """Add what the others add to this rank's own keys and values, (2, B, N, K, D)."""
        offset = 0
        for at in self._leaving:
            for side, part in zip(sums_at(shares, at), share, strict=True):
                side += part[:, offset : offset + at.stop - at.start]
            offset += at.stop - at.start


def _length(pieces: Sequence[Piece]) -> int:
    return sum(stop - start for start, stop in pieces)
