"""Balanced layouts for packed rows whose documents don't see each other: little to send, and equal work.

Legend: T tokens, P ranks.

A document that is on one rank needs nothing from the others, so whole documents are assigned to ranks, the heaviest
first; those too heavy for that are cut in zigzag over all ranks. Every rank holds as many tokens, so some of the
lightest must end just where a rank's tokens do: sets of them that fill a rank to the last token are looked for (a
subset sum), and where none is found the lightest are cut. How heavy is too heavy is tried out, and so are layouts of
equal chunks; the estimated cost of each decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import numpy as np

from ultralong.attention.cost_model import H200, CostModel
from ultralong.attention.kv_plan import plan_kv
from ultralong.attention.layout import Layout, TokenRange, chunk_size, in_chunks, merge_adjacent, zigzag

HEAVY = (1.0, 0.5, 0.25, 0.12)  # documents of more than this fraction of a rank's work are cut
ORDERS = 2  # orders of the documents that are tried for each
LIGHT = 14  # documents a rank, the lightest, that are left to fill the ranks with
POOL = 26  # documents whose every subset is looked at: 2 * 2^13 sums
MATCHES = 2**16  # subsets of the right length that are compared


class PairCounter:
    """Query-key pairs of a packed row: each query sees its document's tokens up to itself.

    Args:
        boundaries: Document boundaries, rising from 0.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self._edges = np.asarray(boundaries, dtype=np.int64)
        self._before = np.concatenate([[0], _triangle(np.diff(self._edges)).cumsum()])  # of whole documents

    def count(self, ranges: Sequence[TokenRange]) -> np.ndarray:
        """The pairs of the queries in each of several ranges."""
        places = np.asarray(ranges, dtype=np.int64)  # (ranges, 2)
        document = np.searchsorted(self._edges, places, "right") - 1
        below = self._before[document] + _triangle(places - self._edges[document])
        return below[:, 1] - below[:, 0]


def _triangle(tokens: np.ndarray) -> np.ndarray:
    return tokens * (tokens + 1) // 2


def work(start: int, stop: int, boundaries: Sequence[int]) -> int:
    """Query-key pairs of the queries [start, stop)."""
    return int(PairCounter(boundaries).count([(start, stop)])[0])


def imbalance(layout: Layout, boundaries: Sequence[int]) -> float:
    """Work of the busiest rank over the mean of all: 1.0 is perfect, the speed is divided by it."""
    pairs = PairCounter(with_padding(boundaries, layout.padded))
    totals = [int(pairs.count(layout.ranges(rank)).sum()) for rank in range(layout.ranks)]
    return max(totals) * layout.ranks / sum(totals)


def cost(layout: Layout, boundaries: Sequence[int], costs: CostModel = H200) -> int:
    """Estimated cost of the busiest rank, in query-key pairs: work, tokens sent to it, kernel calls, an exchange."""
    edges, worst, exchanged = with_padding(boundaries, layout.padded), 0, False
    pairs = PairCounter(edges)
    for ranges in layout.owned:
        seen = plan_kv(ranges, edges)
        extra = costs.pairs_per_token * (seen.tokens - layout.held) + costs.pairs_per_call * len(seen.calls)
        worst = max(worst, int(pairs.count(ranges).sum()) + extra)
        exchanged = exchanged or seen.tokens > layout.held
    return worst + costs.pairs_per_exchange * exchanged


def sends_nothing(layout: Layout, boundaries: Sequence[int]) -> bool:
    """Whether every rank has all that its tokens see: each document is on one rank."""
    edges = with_padding(boundaries, layout.padded)
    return all(plan_kv(ranges, edges).tokens == layout.held for ranges in layout.owned)


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
    enough = good_enough * mean + H200.pairs_per_call  # one call is the fewest
    tried: list[tuple[int, int, Layout]] = []  # number: of equal costs the first one is taken
    for number, layout in enumerate(_tried(tokens, ranks, boundaries, inner, smallest)):
        tried.append((cost(layout, boundaries), number, layout))
        if tried[-1][0] <= enough:
            break
    return min(tried)[2]


def _tried(tokens: int, ranks: int, boundaries: Sequence[int], inner: int, smallest: int) -> Iterator[Layout]:
    """Layouts to choose from."""
    yield zigzag(tokens, ranks, inner)
    pairs = _triangle(np.diff(np.asarray(boundaries, dtype=np.int64)))
    cut_counts = {
        int((pairs > heavy * pairs.sum() / ranks).sum()): heavy for heavy in HEAVY
    }  # each cuts other documents
    for whole, heavy, order in product((True, False), cut_counts.values(), range(ORDERS)):
        yield by_documents(tokens, ranks, boundaries, inner, heavy, order, whole=whole)
    for each in (2, 4, 8, 16):
        if each == 2 or tokens >= ranks * each * smallest:
            chunk = chunk_size(tokens, ranks * each, each, inner)
            owners = _assign_chunks(chunk, ranks, each, with_padding(boundaries, chunk * ranks * each))
            yield in_chunks(tokens, chunk, owners, inner)


def with_padding(boundaries: Sequence[int], padded: int) -> tuple[int, ...]:
    """Boundaries with the padding as one more document."""
    edges = tuple(boundaries)
    return edges if edges[-1] == padded else (*edges, padded)


class RankLoad:
    """What one rank has been assigned so far: ranges of tokens, their work, and its free tokens."""

    def __init__(self, free: int) -> None:
        self.free, self.work = free, 0
        self.ranges: list[TokenRange] = []


def by_documents(
    tokens: int, ranks: int, boundaries: Sequence[int], inner: int, heavy: float, order: int = 0, *, whole: bool = False
) -> Layout:
    """Whole documents to ranks, the heaviest first, to the rank with the least work so far that has free tokens for it.

    Args:
        tokens: Length of the row.
        ranks: Ranks of the first level.
        boundaries: Document boundaries from 0 to `tokens`.
        inner: Members of the second level.
        heavy: Documents of more than this fraction of a rank's work are cut in zigzag over all ranks.
        order: Another number is another order among documents of nearly the same length.
        whole: Look for sets of the lightest documents that fill ranks to the last token, so that none is cut there.
    """
    held = chunk_size(tokens, ranks, 1, inner)
    edges = with_padding(boundaries, held * ranks)
    mean = work(0, edges[-1], edges) / ranks
    loads = [RankLoad(held) for _ in range(ranks)]
    rng = random.Random(order)
    near = {
        document: (document[1] - document[0]) * (1 + 0.5 * rng.random() * (order > 0)) for document in pairwise(edges)
    }
    falling = sorted(near, key=lambda document: (-near[document], document[0]))
    # Cut in zigzag: 2 P parts of a document, the i-th and the i-th from the end to one rank, so that its causal work is
    # equal on all. What does not fit goes to the ranks with the most free tokens.
    cut = [document for document in falling if _pairs(document) > heavy * mean and _length(document) >= 2 * ranks]
    for start, stop in cut:
        cuts = [start + (stop - start) * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for i, (a, b) in enumerate(pairwise(cuts)):
            _place(a, b, start, [loads[min(i, 2 * ranks - 1 - i)], *_by_free_tokens(loads)])
    others = [document for document in falling if document not in cut]
    light = min(LIGHT * ranks, len(others)) if whole else 0
    _assign(others[: len(others) - light], loads)
    _assign(_filled(loads, others[len(others) - light :], mean, rng), loads)
    return Layout(tokens, tuple(merge_adjacent(load.ranges) for load in loads), inner)


def _assign(documents: Sequence[TokenRange], loads: Sequence[RankLoad]) -> None:
    """Assign each document to the rank with the least work that has free tokens for it; where none has, cut it."""
    for start, stop in documents:
        with_room = [load for load in loads if load.free >= stop - start]
        _place(start, stop, start, [min(with_room or loads, key=lambda load: load.work), *_by_free_tokens(loads)])


def _filled(
    loads: Sequence[RankLoad], documents: Sequence[TokenRange], mean: float, rng: random.Random
) -> list[TokenRange]:
    """Fill ranks to the last token with whole documents, as near to the mean work as possible; returns what is left."""
    left = list(documents)
    for load in sorted(loads, key=lambda load: load.free)[:-1]:  # the last one gets the rest
        chosen = subset(rng.sample(left, min(POOL, len(left))), load.free, mean - load.work)
        if chosen is None:
            break
        for start, stop in chosen:
            _place(start, stop, start, [load])
        left = [document for document in left if document not in chosen]
    return left


def subset(documents: Sequence[TokenRange], tokens: int, pairs: float) -> list[TokenRange] | None:
    """Of the sets of documents with just so many tokens the one whose work is nearest to `pairs`; None without one.

    Every subset of one half of the documents meets those of the other half that have the tokens it lacks (Horowitz and
    Sahni 1974, for the subset sum).
    """
    halves = documents[::2], documents[1::2]
    (one, one_pairs), (other, other_pairs) = (
        [_subset_sums([of(document) for document in half]) for of in (_length, _pairs)] for half in halves
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
        document
        for half, chosen in zip(halves, (left[best], right[best]), strict=True)
        for bit, document in enumerate(half)
        if int(chosen) >> bit & 1
    ]


def _subset_sums(values: Sequence[int]) -> np.ndarray:
    """The sum of every subset; bit i of the index says whether value i is in it."""
    sums = np.zeros(1, dtype=np.int64)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def _length(document: TokenRange) -> int:
    return document[1] - document[0]


def _pairs(document: TokenRange) -> int:
    """Query-key pairs of a whole document."""
    return _length(document) * (_length(document) + 1) // 2


def _by_free_tokens(loads: Sequence[RankLoad]) -> list[RankLoad]:
    """The ranks, those with the most free tokens first."""
    return sorted(loads, key=lambda load: -load.free)


def _place(start: int, stop: int, begin: int, loads: Sequence[RankLoad]) -> None:
    """Give tokens [start, stop) of the document that begins at `begin` to the first of these ranks with free tokens."""
    for load in loads:
        end = min(stop, start + load.free)
        if end > start:
            load.ranges.append((start, end))
            load.free -= end - start
            load.work += (start - begin + 1 + end - begin) * (end - start) // 2
            start = end


def _assign_chunks(chunk: int, ranks: int, each: int, boundaries: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Equal chunks to ranks, the heaviest first, to the rank with the least work that has not as many as it gets."""
    costs = PairCounter(boundaries).count([(i * chunk, (i + 1) * chunk) for i in range(ranks * each)]).tolist()
    loads: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in sorted(range(ranks * each), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(loads[r]) < each), key=lambda r: (totals[r], r))
        loads[rank].append(index)
        totals[rank] += costs[index]
    return tuple(tuple(sorted(load)) for load in loads)
