"""How much of a text makes a conversation of a wanted length, where that has to be measured."""

from __future__ import annotations

SLOPES = (0.05, 4.0)  # tokens a character


class SizeSearch:
    """Finds a size by the secant of the last two, and halves what is left where that leads out of it.

    A text may hold many tokens a character in one place and few in another: the secant alone then goes back and forth.

    Args:
        wanted: The length.
        slope: Length for each of size, at first.

    Attributes:
        low: The largest size so far that made too little.
    """

    def __init__(self, wanted: float, slope: float) -> None:
        self._wanted, self._slope = wanted, slope
        self._last: tuple[int, int] | None = None
        self.low = 0
        self._high: int | None = None

    def after(self, size: int, length: int) -> int:
        """The size to try next.

        Args:
            size: What was tried.
            length: What it made.
        """
        if self._last is not None and size != self._last[0]:
            slope = (length - self._last[1]) / (size - self._last[0])
            self._slope = min(SLOPES[1], max(SLOPES[0], slope))
        self._last = size, length
        if length < self._wanted:
            self.low = max(self.low, size)
        else:
            self._high = size if self._high is None else min(self._high, size)
        found = max(1, size + int((self._wanted - length) / self._slope))
        if self._high is not None and self.low < self._high and not self.low < found < self._high:
            return (self.low + self._high) // 2
        return found
