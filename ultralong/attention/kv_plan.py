"""KV plan and exchange plan: which keys a rank's queries see, in how few kernel calls, and who sends what to whom.

Pure functions, no communication.

Legend: P ranks.

A rank holds several ranges of the row. Every range sees the keys from the start of its first document (or of its first
query's window) to its own end. These key ranges are merged and laid end to end: that is the rank's gathered KV buffer,
and nothing else is sent to it. Consecutive query ranges whose keys don't overlap become one varlen call; a range that
sees keys of the one before it (another part of the same document) begins a new call.

Example: documents [0, 100), [100, 400); the rank holds [60, 160) and [300, 400). The first range sees keys [0, 160),
the second [100, 400): merged [0, 400), a buffer of 400 keys. The second sees keys of the first, so there are two calls:
queries 0:100 against buffer 0:160 (segments of 40 queries against 100 keys and of 60 against 60), and queries 100:200
against buffer 100:400.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from ultralong.attention.layout import Layout, TokenRange
from ultralong.attention.spec import VarlenSegments

Places = list[list[slice]]  # for every rank


@dataclass(frozen=True)
class KernelCall:
    """One kernel call: some of the rank's queries with some keys of its gathered KV buffer."""

    queries: slice
    keys: slice
    segments: VarlenSegments | None


@dataclass(frozen=True)
class KVPlan:
    """The keys that one rank's queries see, and its kernel calls.

    Attributes:
        key_ranges: Global ranges of keys, rising and apart.
        calls: The kernel calls over the ranges laid end to end.
    """

    key_ranges: tuple[TokenRange, ...]
    calls: tuple[KernelCall, ...]

    @property
    def tokens(self) -> int:
        """Keys in this rank's gathered KV buffer."""
        return self._starts[-1]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each key range begins in the buffer, and the buffer's length."""
        return (0, *accumulate(stop - start for start, stop in self.key_ranges))

    def overlap(self, ranges: Sequence[TokenRange]) -> list[tuple[slice, slice]]:
        """Where tokens that a rank holds are wanted here: (local tokens of the holder, keys of this rank's buffer).

        Args:
            ranges: Global ranges that a rank holds, in the order it holds them (rising).
        """
        found, offset, index = [], 0, 0
        for start, stop in ranges:
            while index < len(self.key_ranges) and self.key_ranges[index][1] <= start:
                index += 1  # both rise: what ends before this range meets no later one
            for here in range(index, len(self.key_ranges)):
                (first, end), at = self.key_ranges[here], self._starts[here]
                if first >= stop:
                    break
                a, b = max(start, first), min(stop, end)
                if a < b:
                    found.append((slice(offset + a - start, offset + b - start), slice(at + a - first, at + b - first)))
            offset += stop - start
        return found


def plan_kv(ranges: Sequence[TokenRange], boundaries: Sequence[int] | None, window: int | None = None) -> KVPlan:
    """The KV plan of a rank.

    Args:
        ranges: Global ranges that the rank holds, in the order it holds them (rising).
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window: keys that no query of a range can see are left out.
    """
    edges = (0, ranges[-1][1]) if boundaries is None else boundaries
    seen = [(_first_key(start, edges, window), stop) for start, stop in ranges]
    key_ranges: list[TokenRange] = []
    for start, stop in seen:
        if key_ranges and start <= key_ranges[-1][1]:
            key_ranges[-1] = (key_ranges[-1][0], stop)
        else:
            key_ranges.append((start, stop))
    runs: list[list[int]] = []  # of ranges, by index, whose keys don't overlap
    for index, (start, _) in enumerate(seen):
        if not runs or start < seen[index - 1][1]:
            runs.append([])
        runs[-1].append(index)
    buffer = KVPlan(tuple(key_ranges), ())
    calls: list[KernelCall] = []
    first_query = 0
    for run in runs:
        calls.append(_call([ranges[i] for i in run], [seen[i] for i in run], edges, first_query, buffer))
        first_query = calls[-1].queries.stop
    return KVPlan(buffer.key_ranges, tuple(calls))


def _first_key(start: int, edges: Sequence[int], window: int | None) -> int:
    """The first key that the query at `start` sees."""
    begin = edges[bisect_right(edges, start) - 1]
    return begin if window is None else max(begin, start - window + 1)


def _call(
    ranges: Sequence[TokenRange], seen: Sequence[TokenRange], edges: Sequence[int], first_query: int, buffer: KVPlan
) -> KernelCall:
    """One call of ranges whose keys don't overlap."""
    cu_q, cu_k, shared = [0], [0], set()
    for (start, stop), (begin, _) in zip(ranges, seen, strict=True):
        inside = edges[bisect_right(edges, start) : bisect_right(edges, stop - 1)]
        for a, b in pairwise((start, *inside, stop)):
            if (a, b) != (edges[bisect_right(edges, a) - 1], edges[bisect_right(edges, a)]):
                # A part of its document: queries of other calls, or of other ranks, may see its keys.
                shared.add(len(cu_q) - 1)
            cu_q.append(cu_q[-1] + b - a)
            # Keys before the first query are seen by the first document of the range only.
            cu_k.append(cu_k[-1] + b - (begin if a == start else a))
    first_key = buffer.overlap([seen[0]])[0][1].start
    segments = VarlenSegments(tuple(cu_q), tuple(cu_k), frozenset(shared)) if len(cu_q) > 2 else None
    return KernelCall(slice(first_query, first_query + cu_q[-1]), slice(first_key, first_key + cu_k[-1]), segments)


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends to whom and receives from whom.

    Attributes:
        kv_plan: What this rank's queries see, and its kernel calls.
        own: This rank's own tokens: where it holds them, and where they are in its buffer.
        recv: Where what each rank sends is in this rank's buffer; partial gradients are sent back from there.
        send: Which of this rank's tokens each rank is sent.
        grad_recv: Where the partial gradients that each rank sends back belong in this rank's buffer.
        most_keys: Keys in the buffer of the rank that has the most: all ranks take as many heads in a round.
    """

    kv_plan: KVPlan
    own: list[tuple[slice, slice]]
    recv: Places
    send: Places
    grad_recv: Places
    most_keys: int

    @cached_property
    def is_local(self) -> bool:
        """Whether this rank holds just what it needs, in order, so that its own tensors serve as the buffer."""
        return (
            all(held == place for held, place in self.own)
            and not any(self.recv)
            and sum(held.stop - held.start for held, _ in self.own) == self.kv_plan.tokens
        )


def exchange_plan(layout: Layout, rank: int, boundaries: tuple[int, ...] | None, window: int | None) -> ExchangePlan:
    """Who sends what to whom, seen from one rank.

    Args:
        layout: Which tokens each rank holds.
        rank: This one.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window, or None.
    """
    mine, held = plan_kv(layout.ranges(rank), boundaries, window), layout.ranges(rank)
    own, ranks = mine.overlap(held), range(layout.ranks)
    recv: Places = [[] for _ in ranks]
    send: Places = [[] for _ in ranks]
    most_keys = mine.tokens
    for other in (other for other in ranks if other != rank):
        theirs = plan_kv(layout.ranges(other), boundaries, window)
        most_keys = max(most_keys, theirs.tokens)
        recv[other] = [place for _, place in mine.overlap(layout.ranges(other))]
        send[other] = [local for local, _ in theirs.overlap(held)]
    grad_recv = [[_in_buffer(own, local) for local in send[other]] for other in ranks]
    return ExchangePlan(mine, own, recv, send, grad_recv, most_keys)


def _in_buffer(own: list[tuple[slice, slice]], local: slice) -> slice:
    """Where some of a rank's own tokens, a part of one range, are in its buffer."""
    offset = next(place.start - held.start for held, place in own if held.start <= local.start < held.stop)
    return slice(local.start + offset, local.stop + offset)
