"""Layouts for packed rows whose documents don't see each other: little to send, and equal work.

Legend: T tokens, P ranks.

A document that lies on one rank needs nothing from the others, so whole documents are dealt out, the heaviest first;
those too heavy for that are cut in zigzag over all ranks. Every rank holds as many tokens, so some of the lightest must
end just where a rank's tokens do: sets of them that fill a rank to the last token are looked for (a subset sum), and
where none is found the lightest are cut. How heavy is too heavy is tried out, and so are layouts of equal chunks; what
each costs decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import numpy as np

from ultralong.attention.kv_plan import needs
from ultralong.attention.layout import Layout, Piece, chunk_size, in_chunks, joined, zigzag

# What a token's keys and values from another rank cost, and a kernel call, as query-key pairs of one layer's passes: of
# K kv heads of size D, 16 K D bytes at 300 GB/s and as much again in copies, against 14 H D operations a pair at 600
# TF/s and four query heads a kv head; a call's start and end take about 0.1 ms of a GPU that computes 32 heads. Any
# exchange at all is three transfers and the copies that put keys in front of a rank: two H200s gained 0.7 to 1 ms by
# sending nothing where they had sent 243 tokens of 131,072, equal work included, 0.25 ms.
PAIRS_PER_TOKEN = 1000
PAIRS_PER_CALL = 500_000
PAIRS_PER_EXCHANGE = 5_000_000
HEAVY = (1.0, 0.5, 0.25, 0.12)  # documents of more than this share of a rank's work are cut
ORDERS = 2  # orders of the documents that are tried for each
LIGHT = 14  # documents a rank, the lightest, that are left to fill the ranks with
POOL = 26  # documents whose every subset is looked at
MATCHES = 2**16  # subsets of the right length that are compared


class Pairs:
    """Counts query-key pairs of a packed row: each query sees its document's tokens up to itself.

    Args:
        boundaries: Document boundaries, rising from 0.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self._edges = np.asarray(boundaries, dtype=np.int64)
        self._before = np.concatenate([[0], _triangle(np.diff(self._edges)).cumsum()])  # of whole documents

    def of(self, pieces: Sequence[Piece]) -> np.ndarray:
        """The pairs of the queries in each of several ranges."""
        places = np.asarray(pieces, dtype=np.int64)  # (pieces, 2)
        document = np.searchsorted(self._edges, places, "right") - 1
        below = self._before[document] + _triangle(places - self._edges[document])
        return below[:, 1] - below[:, 0]


def _triangle(tokens: np.ndarray) -> np.ndarray:
    return tokens * (tokens + 1) // 2


def work(start: int, stop: int, boundaries: Sequence[int]) -> int:
    """Query-key pairs of the queries [start, stop)."""
    return int(Pairs(boundaries).of([(start, stop)])[0])


def imbalance(layout: Layout, boundaries: Sequence[int]) -> float:
    """Work of the busiest rank over the mean of all: 1.0 is perfect, the speed is divided by it."""
    pairs = Pairs(closed(boundaries, layout.padded))
    totals = [int(pairs.of(layout.pieces(rank)).sum()) for rank in range(layout.ranks)]
    return max(totals) * layout.ranks / sum(totals)


def cost(layout: Layout, boundaries: Sequence[int]) -> int:
    """What the busiest rank does, in query-key pairs: its work, the tokens sent to it, its calls, an exchange."""
    edges, worst, exchanged = closed(boundaries, layout.padded), 0, False
    pairs = Pairs(edges)
    for pieces in layout.owned:
        seen = needs(pieces, edges)
        extra = PAIRS_PER_TOKEN * (seen.tokens - layout.held) + PAIRS_PER_CALL * len(seen.calls)
        worst = max(worst, int(pairs.of(pieces).sum()) + extra)
        exchanged = exchanged or seen.tokens > layout.held
    return worst + PAIRS_PER_EXCHANGE * exchanged


def sends_nothing(layout: Layout, boundaries: Sequence[int]) -> bool:
    """Whether every rank has all that its tokens see: each document lies on one rank."""
    edges = closed(boundaries, layout.padded)
    return all(needs(pieces, edges).tokens == layout.held for pieces in layout.owned)


def balanced(
    tokens: int, ranks: int, boundaries: Sequence[int], inner: int = 1, smallest: int = 1024, good_enough: float = 1.005
) -> Layout:
    """The layout of least cost for packed documents that don't see each other.

    Args:
        tokens: Length of the row.
        ranks: Ranks of the first level.
        boundaries: Document boundaries from 0 to `tokens`.
        inner: Members of the second level.
        smallest: No equal chunk becomes smaller than this by choice (small chunks are slow).
        good_enough: Cost over a rank's mean work at which no further layout is tried.
    """
    mean = work(0, tokens, boundaries) / ranks
    best, least = None, 0
    for layout in _tried(tokens, ranks, boundaries, inner, smallest):
        here = cost(layout, boundaries)
        if best is None or here < least:
            best, least = layout, here
        if least <= good_enough * mean + PAIRS_PER_CALL:  # one call is the fewest
            break
    return best


def _tried(tokens: int, ranks: int, boundaries: Sequence[int], inner: int, smallest: int) -> Iterator[Layout]:
    """Layouts to choose from."""
    yield zigzag(tokens, ranks, inner)
    pairs = _triangle(np.diff(np.asarray(boundaries, dtype=np.int64)))
    shares = {int((pairs > heavy * pairs.sum() / ranks).sum()): heavy for heavy in HEAVY}  # each cuts other documents
    for whole, heavy, order in product((True, False), shares.values(), range(ORDERS)):
        yield by_documents(tokens, ranks, boundaries, inner, heavy, order, whole=whole)
    for each in (2, 4, 8, 16):
        if each == 2 or tokens >= ranks * each * smallest:
            chunk = chunk_size(tokens, ranks * each, each, inner)
            owners = _dealt(chunk, ranks, each, closed(boundaries, chunk * ranks * each))
            yield in_chunks(tokens, chunk, owners, inner)


def closed(boundaries: Sequence[int], padded: int) -> tuple[int, ...]:
    """Boundaries with the padding as one more document."""
    edges = tuple(boundaries)
    return edges if edges[-1] == padded else (*edges, padded)


class Hand:
    """What one rank has been given so far."""

    def __init__(self, room: int) -> None:
        self.room, self.work = room, 0
        self.pieces: list[Piece] = []


def by_documents(
    tokens: int, ranks: int, boundaries: Sequence[int], inner: int, heavy: float, order: int = 0, *, whole: bool = False
) -> Layout:
    """Whole documents to ranks, the heaviest first, to the rank with the least work so far that has room.

    Args:
        tokens: Length of the row.
        ranks: Ranks of the first level.
        boundaries: Document boundaries from 0 to `tokens`.
        inner: Members of the second level.
        heavy: Documents of more than this share of a rank's work are cut in zigzag over all ranks.
        order: Another number is another order among documents of nearly the same length.
        whole: Look for sets of the lightest documents that fill ranks to the last token, so that none is cut there.
    """
    room = chunk_size(tokens, ranks, 1, inner)
    edges = closed(boundaries, room * ranks)
    mean = work(0, edges[-1], edges) / ranks
    hands = [Hand(room) for _ in range(ranks)]
    make = random.Random(order)
    near = {piece: (piece[1] - piece[0]) * (1 + 0.5 * make.random() * (order > 0)) for piece in pairwise(edges)}
    falling = sorted(near, key=lambda piece: (-near[piece], piece[0]))
    cut = [piece for piece in falling if _pairs(piece) > heavy * mean and _length(piece) >= 2 * ranks]
    for start, stop in cut:
        cuts = [start + (stop - start) * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for i, (a, b) in enumerate(pairwise(cuts)):
            _give(a, b, start, [hands[min(i, 2 * ranks - 1 - i)], *_roomy(hands)])
    others = [piece for piece in falling if piece not in cut]
    light = min(LIGHT * ranks, len(others)) if whole else 0
    _deal(others[: len(others) - light], hands)
    _deal(_filled(hands, others[len(others) - light :], mean, make), hands)
    return Layout(tokens, tuple(joined(hand.pieces) for hand in hands), inner)


def _deal(documents: Sequence[Piece], hands: Sequence[Hand]) -> None:
    """Documents to the hand with the least work that has room; where none has, they are cut."""
    for start, stop in documents:
        open_ = [hand for hand in hands if hand.room >= stop - start]
        _give(start, stop, start, [min(open_ or hands, key=lambda hand: hand.work), *_roomy(hands)])


def _filled(hands: Sequence[Hand], documents: Sequence[Piece], mean: float, make: random.Random) -> list[Piece]:
    """Fill hands to the last token with whole documents, as near as that goes to the mean work; what is left over."""
    left = list(documents)
    for hand in sorted(hands, key=lambda hand: hand.room)[:-1]:  # the last one gets the rest
        chosen = subset(make.sample(left, min(POOL, len(left))), hand.room, mean - hand.work)
        if chosen is None:
            break
        for start, stop in chosen:
            _give(start, stop, start, [hand])
        left = [piece for piece in left if piece not in chosen]
    return left


def subset(documents: Sequence[Piece], tokens: int, pairs: float) -> list[Piece] | None:
    """Of the sets of documents with just so many tokens the one whose work is nearest to `pairs`; None without one.

    Every subset of one half of the documents meets those of the other half that have the tokens it lacks (Horowitz and
    Sahni 1974, for the subset sum).
    """
    halves = documents[::2], documents[1::2]
    (one, one_pairs), (other, other_pairs) = (
        [_subset_sums([of(piece) for piece in half]) for of in (_length, _pairs)] for half in halves
    )
    order = np.argsort(other, kind="stable")
    first, end = (np.searchsorted(other[order], tokens - one, side) for side in ("left", "right"))
    counts = end - first
    counts[counts.cumsum() > MATCHES] = 0  # documents of equal length make millions
    if not counts.any():
        return None
    left = np.repeat(np.arange(one.size), counts)
    right = order[np.arange(left.size) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(first, counts)]
    best = int(np.abs(one_pairs[left] + other_pairs[right] - pairs).argmin())
    return [
        piece
        for half, chosen in zip(halves, (left[best], right[best]), strict=True)
        for bit, piece in enumerate(half)
        if int(chosen) >> bit & 1
    ]


def _subset_sums(values: Sequence[int]) -> np.ndarray:
    """The sum of every subset; bit i of the index says whether value i is in it."""
    sums = np.zeros(1, dtype=np.int64)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def _length(piece: Piece) -> int:
    return piece[1] - piece[0]


def _pairs(document: Piece) -> int:
    """Query-key pairs of a whole document."""
    return _length(document) * (_length(document) + 1) // 2


def _roomy(hands: Sequence[Hand]) -> list[Hand]:
    """Those with the most room first."""
    return sorted(hands, key=lambda hand: -hand.room)


def _give(start: int, stop: int, begin: int, hands: Sequence[Hand]) -> None:
    """Give the tokens [start, stop) of the document that begins at `begin` to the first of the hands that have room."""
    for hand in hands:
        end = min(stop, start + hand.room)
        if end > start:
            hand.pieces.append((start, end))
            hand.room -= end - start
            hand.work += (start - begin + 1 + end - begin) * (end - start) // 2
            start = end


def _dealt(chunk: int, ranks: int, each: int, boundaries: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Equal chunks to ranks, the heaviest first, to the rank with the least work that has not as many as it gets."""
    costs = Pairs(boundaries).of([(i * chunk, (i + 1) * chunk) for i in range(ranks * each)]).tolist()
    hands: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in sorted(range(ranks * each), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < each), key=lambda r: (totals[r], r))
        hands[rank].append(index)
        totals[rank] += costs[index]
    return tuple(tuple(sorted(hand)) for hand in hands)
