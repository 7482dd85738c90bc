"""Which keys a rank's queries see, laid out for few and exact kernel calls: pure functions, no communication.

Legend: P ranks.

A rank holds several pieces of the row. Every piece sees the keys from the start of its first document (or of its first
query's window) to its own end. The ranges of all pieces are joined and laid end to end: that is what a rank must have
in front of it, and nothing else is sent to it. Pieces one after another whose ranges don't overlap become one packed
call; a piece that sees keys of the one before it (another part of the same document) begins a new call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from ultralong.attention.layout import Piece
from ultralong.attention.spec import Spans


@dataclass(frozen=True)
class Call:
    """One kernel call: these of the rank's rows with these of the keys in front of it."""

    rows: slice
    keys: slice
    spans: Spans | None


@dataclass(frozen=True)
class Needs:
    """What one rank's queries need.

    Attributes:
        ranges: Global ranges of keys, rising and apart.
        calls: The kernel calls over the ranges laid end to end.
    """

    ranges: tuple[Piece, ...]
    calls: tuple[Call, ...]

    @property
    def tokens(self) -> int:
        """Keys in front of this rank."""
        return self._starts[-1]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(stop - start for start, stop in self.ranges))

    def among(self, pieces: Sequence[Piece]) -> list[tuple[slice, slice]]:
        """Where pieces that a rank holds meet the ranges: (tokens of the holder, keys in front of this rank).

        Args:
            pieces: Global ranges that a rank holds, in the order it holds them (rising).
        """
        met, offset, index = [], 0, 0
        for start, stop in pieces:
            while index < len(self.ranges) and self.ranges[index][1] <= start:
                index += 1  # both rise: what ends before this piece meets no later one
            for here in range(index, len(self.ranges)):
                (first, end), at = self.ranges[here], self._starts[here]
                if first >= stop:
                    break
                a, b = max(start, first), min(stop, end)
                if a < b:
                    met.append((slice(offset + a - start, offset + b - start), slice(at + a - first, at + b - first)))
            offset += stop - start
        return met


def needs(pieces: Sequence[Piece], boundaries: Sequence[int] | None, window: int | None = None) -> Needs:
    """The keys that a rank needs, and its calls.

    Args:
        pieces: Global ranges that the rank holds, in the order it holds them (rising).
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window: keys that no query of a piece can see are left out.
    """
    edges = (0, pieces[-1][1]) if boundaries is None else boundaries
    seen = [(_first_key(start, edges, window), stop) for start, stop in pieces]
    ranges: list[Piece] = []
    for start, stop in seen:
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    runs: list[list[int]] = []
    for index, (start, _) in enumerate(seen):
        if not runs or start < seen[index - 1][1]:
            runs.append([])
        runs[-1].append(index)
    found = Needs(tuple(ranges), ())
    calls, row = [], 0
    for run in runs:
        call = _call([pieces[i] for i in run], [seen[i] for i in run], edges, row, found)
        calls.append(call)
        row = call.rows.stop
    return Needs(found.ranges, tuple(calls))


def _first_key(start: int, edges: Sequence[int], window: int | None) -> int:
    begin = edges[bisect_right(edges, start) - 1]
    return begin if window is None else max(begin, start - window + 1)


def _call(pieces: Sequence[Piece], seen: Sequence[Piece], edges: Sequence[int], row: int, found: Needs) -> Call:
    """One call of pieces whose keys don't overlap."""
    cuts_q, cuts_k, shared = [0], [0], set()
    for (start, stop), (begin, _) in zip(pieces, seen, strict=True):
        inside = edges[bisect_right(edges, start) : bisect_right(edges, stop - 1)]
        for a, b in pairwise((start, *inside, stop)):
            if (a, b) != (edges[bisect_right(edges, a) - 1], edges[bisect_right(edges, a)]):
                shared.add(len(cuts_q) - 1)  # a part of its document: other calls' queries may see its keys
            cuts_q.append(cuts_q[-1] + b - a)
            cuts_k.append(cuts_k[-1] + b - (begin if a == start else a))
    first = found.among([seen[0]])[0][1].start
    spans = Spans(tuple(cuts_q), tuple(cuts_k), frozenset(shared)) if len(cuts_q) > 2 else None
    return Call(slice(row, row + cuts_q[-1]), slice(first, first + cuts_k[-1]), spans)
