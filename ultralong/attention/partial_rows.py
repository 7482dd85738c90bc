"""Rows of a result that come in several parts.

Legend: B batch, T tokens, n tokens of a range of rows, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Parts:
    """Rows of a tensor that several parts are added or joined to, in one type until all have come.

    Args:
        x: (B, T, H, D), what the first parts gave; changed in the end or given up.
        rows: Which rows more parts belong to, ranges apart; the others are left alone.
        dtype: The type to work in.
    """

    def __init__(self, x: Tensor, rows: Sequence[slice], dtype: torch.dtype) -> None:
        self._x, self._rows = x, rows
        self._parts = [x[:, place].to(dtype) for place in rows]  # of x's own type: views

    def at(self, rows: slice) -> Tensor:
        """Some of those rows (B, n, H, D), to be read or changed in place."""
        index, inside = self._find(rows)
        return self._parts[index][:, inside]

    def put(self, rows: slice, part: Tensor) -> None:
        """Let some of those rows be `part` (B, n, H, D), which is kept where it is all of a range."""
        index, inside = self._find(rows)
        if part.shape == self._parts[index].shape:
            self._parts[index] = part
        else:
            self._parts[index][:, inside] = part

    def whole(self) -> Tensor:
        """The tensor (B, T, H, D) with its rows in place, rounded to its type."""
        for place, part in zip(self._rows, self._parts, strict=True):
            if part.shape == self._x.shape and part.dtype == self._x.dtype:
                return part
            if part.untyped_storage().data_ptr() != self._x.untyped_storage().data_ptr():  # else it is in its place
                self._x[:, place] = part
        return self._x

    def _find(self, rows: slice) -> tuple[int, slice]:
        """Which range holds some rows, and where in it."""
        for index, place in enumerate(self._rows):
            if place.start <= rows.start and rows.stop <= place.stop:
                return index, slice(rows.start - place.start, rows.stop - place.start)
        raise LookupError(f"rows {rows.start} to {rows.stop} are not among those that come in parts")
