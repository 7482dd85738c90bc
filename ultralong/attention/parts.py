"""Rows of a result that come in several parts.

Legend: B batch, T tokens, n tokens of a range of rows, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Parts:
    """Rows that several parts add up to or are joined to, (B, n, H, D) each, in one type until all have come.

    Args:
        rows: Which rows, ranges apart.
        dtype: The type to add in.
    """

    def __init__(self, rows: Sequence[slice], dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype
        self._parts: list[Tensor | None] = [None] * len(rows)

    def start(self, x: Tensor) -> None:
        """Begin with the rows of x (B, T, H, D)."""
        self._parts = [x[:, place].to(self._dtype) for place in self._rows]

    def at(self, rows: slice) -> Tensor:
        """Some of the rows."""
        index, inside = self._find(rows)
        return self._parts[index][:, inside]

    def put(self, rows: slice, part: Tensor) -> None:
        """Let some of the rows be `part`, which is in their type and may stay."""
        index, inside = self._find(rows)
        if inside == slice(0, _length_of(self._rows[index])):
            self._parts[index] = part
        else:
            self._parts[index][:, inside] = part

    def add(self, rows: slice, part: Tensor) -> None:
        """Add to some of the rows, in place if there was something."""
        index, inside = self._find(rows)
        length = _length_of(self._rows[index])
        if self._parts[index] is None and inside == slice(0, length):
            self._parts[index] = part.to(self._dtype)
            return
        if self._parts[index] is None:
            self._parts[index] = part.new_zeros((part.shape[0], length, *part.shape[2:]), dtype=self._dtype)
        self._parts[index][:, inside] += part

    def add_own(self, x: Tensor) -> None:
        """Add the rows of x (B, T, H, D)."""
        for place in self._rows:
            self.add(place, x[:, place])

    def write(self, x: Tensor) -> Tensor:
        """The tensor x (B, T, H, D) with its rows in place, rounded to its type; x itself is changed or given up."""
        for place, part in zip(self._rows, self._parts, strict=True):
            if part.shape == x.shape and part.dtype == x.dtype:
                return part
            if part.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():  # else it is in its place
                x[:, place] = part
        return x

    def _find(self, rows: slice) -> tuple[int, slice]:
        """Which range holds some rows, and where in it."""
        for index, place in enumerate(self._rows):
            if place.start <= rows.start and rows.stop <= place.stop:
                return index, slice(rows.start - place.start, rows.stop - place.start)
        raise LookupError(f"rows {rows.start} to {rows.stop} are not among those that are added up")


def _length_of(rows: slice) -> int:
    return rows.stop - rows.start
