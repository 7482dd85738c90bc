"""What circulates in a ring and which of it each rank's queries see: pure functions of lengths, no communication.

Documents that don't see each other may have any lengths: two ranges of the row share at most one document (the one in
which the earlier range ends), so what a block adds to a range is at most one full rectangle, never a mask. And only
that document's keys and values circulate.

Under a sliding window a range's queries see less of the tokens before it: the last `window - 1` of them. Only those
circulate, a rectangle whose keys are all out of reach is left out, and one that the window cuts obliquely becomes a
call with a window of its own (`Block.window`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations
from typing import NamedTuple

from ultralong.attention.layout import Layout, TokenRange
from ultralong.attention.spec import VarlenSegments

Rectangle = tuple[slice, slice]  # local query rows, keys of the block; every row sees every key


class Block(NamedTuple):
    """Queries of a rank and keys that they see, of its own or of a block that has come; none is causal.

    Attributes:
        rows: Local query rows.
        keys: Keys of the block.
        window: None where every row sees every key; else as `AttentionSpec.window` of a call that is not causal: the
            last row, lined up with the last key, sees no key further back than `window - 1`.
    """

    rows: slice
    keys: slice
    window: int | None = None


def own_segments(
    ranges: Sequence[TokenRange], boundaries: Sequence[int], window: int | None = None
) -> VarlenSegments | None:
    """Documents among a rank's own tokens; ranges of one document are one segment, since both are in order.

    Under a window they are two: what lies between them counts.
    """
    held: dict[tuple[int, TokenRange], int] = {}  # tokens by range and document, in order
    for index, (start, stop) in enumerate(ranges):
        at = start
        while at < stop:
            document = _document(boundaries, at)
            end = min(stop, document[1])
            part = (0 if window is None else index, document)
            held[part] = held.get(part, 0) + end - at
            at = end
    cu_seqlens = (0, *accumulate(held.values()))
    shared = frozenset(i for i, ((_, (start, stop)), count) in enumerate(held.items()) if count < stop - start)
    return VarlenSegments(cu_seqlens, cu_seqlens, shared) if len(held) > 1 else None


def circulating_ranges(
    ranges: Sequence[TokenRange], end: int, boundaries: Sequence[int] | None, window: int | None = None
) -> list[TokenRange]:
    """Which of a rank's tokens other ranks see: of each range the document that continues after it.

    Args:
        ranges: Global ranges that the rank holds; what follows one is another rank's.
        end: End of the row.
        boundaries: Document boundaries when documents don't see each other, else None.
        window: Sliding window: only tokens within its reach of the range's end are seen from beyond it.
    """
    found = []
    for start, stop in ranges:
        begin, finish = (0, end) if boundaries is None else _document(boundaries, stop - 1)
        first = max(start, begin) if window is None else max(start, begin, stop - window + 1)
        if finish > stop > first:
            found.append((first, stop))
    return found


def rectangles(
    mine: Sequence[TokenRange], theirs: Sequence[TokenRange], boundaries: Sequence[int] | None
) -> list[Rectangle]:
    """What a rank's tokens see of another rank's: full rectangles, adjacent ones merged.

    Args:
        mine: Global ranges of the queries.
        theirs: Global ranges of the keys; none overlaps `mine`.
        boundaries: Document boundaries when documents don't see each other, else None.
    """
    found = [(rows.start, rows.stop, keys.start, keys.stop) for rows, keys, _ in _blocks(mine, theirs, boundaries)]
    return [(slice(a, b), slice(c, d)) for a, b, c, d in _merge_rectangles(found)]


def blocks_seen(
    mine: Sequence[TokenRange], theirs: Sequence[TokenRange], boundaries: Sequence[int] | None, window: int | None
) -> list[Block]:
    """`rectangles` as blocks, and under a window what it leaves of them.

    `theirs` may be `mine` as well: what a range's queries see of the ranges before it.
    """
    if window is None:
        return [Block(rows, keys) for rows, keys in rectangles(mine, theirs, boundaries)]
    return _blocks(mine, theirs, boundaries, window)


def _blocks(
    mine: Sequence[TokenRange],
    theirs: Sequence[TokenRange],
    boundaries: Sequence[int] | None,
    window: int | None = None,
) -> list[Block]:
    """One block for each pair of ranges of which the later one sees something of the earlier one."""
    found: list[Block] = []
    row = 0
    for start, stop in mine:
        column = 0
        for first, end in theirs:
            if first < start:
                begin, finish = (0, stop) if boundaries is None else _document(boundaries, end - 1)
                low, high, cut = max(first, begin), min(stop, finish), None
                if window is not None:
                    low, high = max(low, start - window + 1), min(high, end - 1 + window)
                    cut = end - high + window if high - 1 - low >= window else None
                if high > start and end > low:
                    rows = slice(row, row + high - start)
                    found.append(Block(rows, slice(column + low - first, column + end - first), cut))
            column += end - first
        row += stop - start
    return found


def _document(boundaries: Sequence[int], position: int) -> TokenRange:
    at = bisect_right(boundaries, position)
    return boundaries[at - 1], boundaries[at]


def _merge_rectangles(found: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Merge rectangles that share their rows and touch in their keys, or the other way round, until none is left."""
    for i, (a, b, c, d) in enumerate(found):
        for j, (e, f, g, h) in enumerate(found):
            if (a, b) == (e, f) and d == g:
                merged = (a, b, c, h)
            elif (c, d) == (g, h) and b == e:
                merged = (a, f, c, d)
            else:
                continue
            return _merge_rectangles([merged, *(r for n, r in enumerate(found) if n not in (i, j))])
    return sorted(found)


@dataclass(frozen=True, eq=False)
class RingPlan:
    """What one rank of a ring sends, sees and merges.

    Attributes:
        rank: The rank.
        layout: Which tokens each holds.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window, or None.
    """

    rank: int
    layout: Layout
    boundaries: tuple[int, ...] | None
    window: int | None = None

    @cached_property
    def segments(self) -> VarlenSegments | None:
        """Documents among this rank's own tokens; under a window, of each of its ranges."""
        if self.boundaries is None and self.window is None:
            return None
        boundaries = self.boundaries or (0, self.layout.padded)
        return own_segments(self.layout.ranges(self.rank), boundaries, self.window)

    @cached_property
    def own_blocks(self) -> list[Block]:
        """Under a window, what a range's queries see of this rank's ranges before it."""
        mine = self.layout.ranges(self.rank)
        return [] if self.window is None else blocks_seen(mine, mine, self.boundaries, self.window)

    @cached_property
    def circulating(self) -> list[list[TokenRange]]:
        """What circulates of each rank's tokens, by hops behind this rank (0: this rank's own)."""
        ranks = [(self.rank - hop) % self.layout.ranks for hop in range(self.layout.ranks)]
        end, window = self.layout.padded, self.window
        return [circulating_ranges(self.layout.ranges(rank), end, self.boundaries, window) for rank in ranks]

    @cached_property
    def own_circulating(self) -> list[slice]:
        """Where this rank holds those of its own tokens that circulate."""
        found, offset = [], 0
        for start, stop in self.layout.ranges(self.rank):
            found += [
                slice(offset + a - start, offset + b - start) for a, b in self.circulating[0] if start <= a < stop
            ]
            offset += stop - start
        return found

    @cached_property
    def blocks(self) -> list[list[Block]]:
        """For every hop but the first, what this rank sees of the block that has come; none where nothing circulates.

        What circulates is the same on every rank, so that all of them make the same hops.
        """
        if not any(self.circulating):
            return []
        mine = self.layout.ranges(self.rank)
        return [blocks_seen(mine, ranges, self.boundaries, self.window) for ranges in self.circulating[1:]]

    @property
    def _all_rows(self) -> list[slice]:
        return [block.rows for seen in (self.own_blocks, *self.blocks) for block in seen]

    @cached_property
    def merged_rows(self) -> list[slice]:
        """Which queries see other ranks' tokens, ranges apart: only their results are merged from several calls."""
        found: list[slice] = []
        for rows in sorted(self._all_rows, key=lambda rows: rows.start):
            if found and rows.start <= found[-1].stop:
                found[-1] = slice(found[-1].start, max(found[-1].stop, rows.stop))
            else:
                found.append(rows)
        return found

    @cached_property
    def merged_once(self) -> bool:
        """Whether no query's result is merged more than once: then q's own dtype rounds no more than float32 would."""
        return self.layout.ranks == 2 and all(_apart(a, b) for a, b in combinations(self._all_rows, 2))

    def tokens(self, hop: int) -> int:
        """Tokens of the block that has made so many hops to this rank."""
        return sum(stop - start for start, stop in self.circulating[hop % self.layout.ranks])


def _apart(a: slice, b: slice) -> bool:
    return a.stop <= b.start or b.stop <= a.start
