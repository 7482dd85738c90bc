"""A fixed number of conversations out of a large blend, by category, the same ones on every run.

Every conversation has a number in [0, 1) that belongs to the seed and its id; of each category those with the smallest
numbers are taken. So the choice hangs neither on the order of reading nor on what else is there, the count is met
exactly, and a conversation that is in the sample of 50,000 is in that of 100,000 too.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ultralong.data.select.length_rule import uniform

T = TypeVar("T")


@dataclass(frozen=True)
class Subsample:
    """How many conversations a recipe takes.

    Attributes:
        total: Of all categories together.
        shares: Each category's share of them; None takes of each in proportion to its well-formed conversations. The
            paper (arXiv 2504.06214) names 100,000 and its categories, not their shares.
    """

    total: int
    shares: dict[str, float] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total must be at least 1, found {self.total}.")
        if self.shares is not None:
            if not self.shares or any(share < 0 for share in self.shares.values()):
                raise ValueError(f"shares must be 0 or more, found {self.shares}.")
            if abs(sum(self.shares.values()) - 1) > 1e-6:
                raise ValueError(f"shares must add up to 1, found {sum(self.shares.values()):g}.")

    def quotas(self, seen: dict[str, int]) -> dict[str, int]:
        """How many of each category: whole numbers by largest remainder, which add up to `total`.

        Args:
            seen: Well-formed conversations by category; decides where there are no shares, and caps nothing.
        """
        shares = self.shares
        if shares is None:
            every = sum(seen.values())
            shares = {name: count / every for name, count in seen.items()} if every else {}
        exact = {name: share * self.total for name, share in shares.items()}
        quotas = {name: int(value) for name, value in exact.items()}
        left = self.total - sum(quotas.values()) if exact else 0
        for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name))[:left]:
            quotas[name] += 1
        return quotas


class HashSample(Generic[T]):
    """Holds the best of what came by: at most `total` of each category, whatever the size of the stream.

    Args:
        rule: How many.
        seed: With an id, decides on it.

    Raises:
        ValueError: An item is of a category that the shares do not name (from `wanted`).
    """

    def __init__(self, rule: Subsample, seed: int) -> None:
        self.rule, self.seed = rule, seed
        self.seen: Counter[str] = Counter()
        self._heaps: dict[str, list[tuple[float, int, T]]] = {}
        self._limits = None if rule.shares is None else rule.quotas({})

    def wanted(self, id: str, category: str) -> bool:
        """Count a well-formed item; False when it cannot be among those taken any more, so its work can be saved."""
        limit = self._limit(category)
        self.seen[category] += 1
        heap = self._heaps.setdefault(category, [])
        return limit > 0 and (len(heap) < limit or -uniform(self.seed, id) > heap[0][0])

    def add(self, id: str, category: str, number: int, item: T) -> None:
        """Take an item in; the worst of its category leaves when there are too many."""
        heap = self._heaps.setdefault(category, [])
        entry = (-uniform(self.seed, id), -number, item)
        if len(heap) < self._limit(category):
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)

    def taken(self) -> list[T]:
        """Those chosen, in the order in which they came."""
        quotas = self.rule.quotas(dict(self.seen))
        best = (
            entry
            for name, heap in self._heaps.items()
            for entry in sorted(heap, key=lambda entry: entry[:2], reverse=True)[: quotas.get(name, 0)]
        )
        return [item for _, _, item in sorted(best, key=lambda entry: -entry[1])]

    def as_json(self) -> dict[str, dict[str, int]]:
        """For every category: well-formed conversations seen, how many were wanted, how many taken."""
        quotas = self.rule.quotas(dict(self.seen))
        return {
            name: {
                "seen": self.seen[name],
                "wanted": quotas.get(name, 0),
                "taken": min(quotas.get(name, 0), len(self._heaps.get(name, []))),
            }
            for name in sorted({*self.seen, *quotas})
        }

    def _limit(self, category: str) -> int:
        if self._limits is None:
            return self.rule.total
        if category not in self._limits:
            raise ValueError(f"category {category!r} has no share: {', '.join(self._limits)} have one.")
        return self._limits[category]


def summary(counted: dict[str, Any]) -> str:
    """One line: what was taken of what, and where a category fell short."""
    return ", ".join(
        f"{name} {row['taken']:,} of {row['seen']:,}"
        + (f" ({row['wanted'] - row['taken']:,} short)" if row["taken"] < row["wanted"] else "")
        for name, row in counted.items()
    )
