"""Time for which a rank on a CPU was ready and other programs had its core: no work of its own, and nobody's fault.

Beside other load such a rank computes two and three times as long as the others, for seconds on end, and changes places
with them. What it did itself takes as long as ever, and that is what ranks are compared by.
"""

from __future__ import annotations

from typing import Any

import torch

from ultralong.attention.collectives import WaitClock


def queued_seconds() -> float:
    """Seconds for which this thread has waited for a core since it began; 0 where the system does not say (Linux does).

    Source: Documentation/scheduler/sched-stats.rst of Linux, the second number of a thread's schedstat.
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):  # no Linux, or one that keeps no such record
        return 0.0


class HeldBackClock(WaitClock):
    """A WaitClock of the CPU that also adds up how long this thread was held back outside of collectives."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begin, self._inside = queued_seconds(), 0.0  # at the last question, and in collectives since then

    def now(self) -> Any:
        """The current time: seconds, and for how many this thread was held back before."""
        return super().now(), queued_seconds()

    def add_since(self, start: Any, what: str = "") -> None:
        """Count the time from a moment until now as waiting in a collective."""
        super().add_since(start[0], what)
        self._inside += queued_seconds() - start[1]

    def take_held_back(self) -> float:
        """Seconds for which this thread was held back since the last call, in collectives not: those are waited for."""
        now = queued_seconds()
        held, self._begin, self._inside = now - self._begin - self._inside, now, 0.0
        return max(held, 0.0)
