"""A GPU's memory over the tokens of a row that it holds; what a step does is taken to grow in straight lines."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from ultralong.planner.memory import gpu_total
from ultralong.planner.workload import Workload

STEP = 1024  # the longest row is given in multiples of this
SHORT = 65536  # below this a step's memory does not yet grow in a straight line with the row


@dataclass(frozen=True)
class Growth:
    """Memory of one run at other lengths.

    Attributes:
        workload: The run.
    """

    workload: Workload

    @cached_property
    def _ends(self) -> tuple[Workload, Workload]:
        high = max(self.workload.share, SHORT)
        return self.workload.with_tokens_per_gpu(high // 2), self.workload.with_tokens_per_gpu(high)

    def at(self, share: int) -> Workload:
        """The run with so many tokens of a row on a GPU; its step lies on the line through two traced ones."""
        return _at(*self._ends, share)

    def longest(self, budget: float) -> int:
        """The longest row that fits, over the GPUs that share it."""
        low, high = self._ends
        share = _longest(low, high, budget)
        if share > high.share:  # the line bends where another moment becomes the worst one: again, from nearer
            share = _longest(high, self.workload.with_tokens_per_gpu(share), budget)
        return share * self.workload.context_parallel_size

    def context_parallel_size(self, budget: float) -> int | None:
        """The power of two of GPUs that have to share the row for it to fit, or None where none is enough."""
        tokens = self.workload.tokens
        counts = (2**i for i in range(tokens.bit_length()))
        return next((count for count in counts if _between(*self._ends, -(-tokens // count)) <= budget), None)


def _longest(low: Workload, high: Workload, budget: float) -> int:
    """Tokens of one GPU that fit, by what two workloads take."""

    def total(steps: int) -> float:
        return _between(low, high, steps * STEP)

    most = next(steps for steps in (2**i for i in itertools.count()) if total(steps) > budget)
    return max(0, bisect_right(range(most), budget, key=total) - 1) * STEP


def _between(low: Workload, high: Workload, share: int) -> float:
    """Bytes on a GPU with so many tokens of a row, on the line through two workloads."""
    return gpu_total(_at(low, high, share))


def _at(low: Workload, high: Workload, share: int) -> Workload:
    traced = low.trace.towards(high.trace, (share - low.share) / (high.share - low.share))
    return replace(high.with_tokens_per_gpu(share), traced=traced)
