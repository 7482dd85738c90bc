"""Ring: queries stay, keys and values go round; partial results are joined by their log-sum-exp.

Legend: B batch, T tokens a rank holds, P ranks, H query heads, K kv heads, D head size.

Ring attention (arXiv 2310.01889) over the zigzag layout. While a rank computes with one block of K and V, the next one
comes. Output, log-sum-exp and all gradients are added in float32; the backward pass uses the joined pair, so that
every block's share of the gradients simply adds up; what other ranks add to a block's dK and dV travels one hop behind
the block and comes home after P - 1 hops.

Documents that don't see each other need no equal lengths here: two pieces of the row share at most one document (the
one in which the earlier piece ends), so what a block adds to a piece is at most one full rectangle, never a mask.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, pass_on
from ultralong.attention.kernels import Kernel, attention_backward, attention_forward
from ultralong.attention.layout import Layout, Piece
from ultralong.attention.merge import accumulator, merge_into
from ultralong.attention.rule import Rule, Spans
from ultralong.attention.scheme import Gradients, Pair, Scheme

Rectangle = tuple[slice, slice]  # local query rows, keys of the block; every row sees every key


def own_spans(pieces: Sequence[Piece], boundaries: Sequence[int]) -> Spans | None:
    """Documents among a rank's own tokens: pieces of one document count as one run, since both are in order."""
    edges, cuts, offset, last = list(boundaries), [0], 0, -1
    for start, stop in pieces:
        if offset and bisect_right(edges, start) != bisect_right(edges, last):
            cuts.append(offset)
        cuts += [offset + edge - start for edge in edges[bisect_right(edges, start) : bisect_left(edges, stop)]]
        offset, last = offset + stop - start, stop - 1
    spans = Spans((*cuts, offset), (*cuts, offset))
    return spans if spans.count > 1 else None


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
                    found.append((row, row + min(stop, finish) - start, column + max(first, begin) - first,
                                  column + end - first))
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
    def _once(self) -> bool:
        """Whether every gradient on every rank is a sum of two parts: added in their own type, they round no more."""
        if self.layout.ranks != 2:
            return False
        a, b = self.layout.pieces(0), self.layout.pieces(1)
        both = [rectangles(a, b, self.boundaries), rectangles(b, a, self.boundaries)]
        return all(_apart(x, y) for found in both for one, other in combinations(found, 2) for x, y in zip(one, other))

    @cached_property
    def blocks(self) -> list[list[Rectangle]]:
        """For every hop but the first, what this rank sees of the block that has come."""
        mine = self.layout.pieces(self.rank)
        sources = [(self.rank - hop) % self.layout.ranks for hop in range(1, self.layout.ranks)]
        return [rectangles(mine, self.layout.pieces(source), self.boundaries) for source in sources]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """The pair's lse is (B, H, T)."""
        block = torch.stack([k, v])  # (2, B, T, K, D)
        coming = pass_on(block, self.group) if self.blocks else None
        out, lse = attention_forward(self.kernel, q, k, v, rule.with_spans(self.own))
        out, lse = out.to(accumulator(q.dtype)), lse.contiguous()
        for hop, seen in enumerate(self.blocks, start=1):
            block = coming.wait()
            coming = pass_on(block, self.group) if hop < len(self.blocks) else None
            for rows, keys in seen:
                part, part_lse = attention_forward(self.kernel, q[:, rows], block[0][:, keys], block[1][:, keys],
                                                   rule.full())
                merge_into(out[:, rows], lse[:, :, rows], part, part_lse)
        return out.to(q.dtype), lse

    def attend_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                        rule: Rule) -> Gradients:
        """The blocks go round once more; their gradients follow one hop behind."""
        wide = accumulator(q.dtype)
        block = torch.stack([k, v])
        coming = pass_on(block, self.group) if self.blocks else None
        dq, dk, dv = attention_backward(self.kernel, dout, q, k, v, out, lse, rule.with_spans(self.own))
        if not self.blocks:
            return dq, dk, dv
        if not self._once:
            dq, dk, dv = dq.to(wide), dk.to(wide), dv.to(wide)
        behind = None
        for hop, seen in enumerate(self.blocks, start=1):
            block = coming.wait()
            coming = pass_on(block, self.group) if hop < len(self.blocks) else None
            parts = [(keys, self._part(rows, keys, block, dq, dout, q, out, lse, rule)) for rows, keys in seen]
            share = torch.zeros_like(block, dtype=dk.dtype) if behind is None else behind.wait()
            for keys, (to_keys, to_values) in parts:
                share[0][:, keys] += to_keys
                share[1][:, keys] += to_values
            behind = pass_on(share, self.group, tag=1)
        share = behind.wait()  # what the others add to this rank's own keys and values
        dk += share[0]
        dv += share[1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _part(self, rows: slice, keys: slice, block: Tensor, dq: Tensor, dout: Tensor, q: Tensor, out: Tensor,
              lse: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """One rectangle's share: added to dq, returned for its keys and values."""
        to_query, dk, dv = attention_backward(self.kernel, dout[:, rows], q[:, rows], block[0][:, keys],
                                              block[1][:, keys], out[:, rows], lse[:, :, rows], rule.full())
        dq[:, rows] += to_query
        return dk, dv
