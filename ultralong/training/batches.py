"""Which rows a step trains on, and how rows become the tensors of one forward pass.

B rows at once, T tokens a row. The order is a pure function of the seed and the step: nothing has to be saved to resume
at the exact row, and the number of processes does not change what a step sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ultralong.data.rows.packed_rows import PackedRow, PackedRows
from ultralong.data.rows.permutation import permuted
from ultralong.training.config import DataSource


@dataclass(frozen=True)
class Place:
    """One row: which source, which row of it."""

    source: int
    row: int


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass, before they are split over context-parallel processes.

    Attributes:
        input_ids: (B, T); with a document mask the rows are laid end to end, (1, B * T).
        labels: As `input_ids`, already shifted, -100 for no target.
        position_ids: As `input_ids`.
        boundaries: (N + 1,) int32 cumulative document lengths where attention must not cross documents, else None.
        places: Where the rows came from, to name them when something goes wrong.
        row_length: T.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    boundaries: Tensor | None
    places: tuple[Place, ...]
    row_length: int


class RowOrder:
    """The rows of a run in order: each source in passes of its own pseudo-random order, sources drawn by weight.

    Args:
        sources: Where rows come from.
        seed: Names the order.
        total: Rows the whole run draws.
        length: Tokens that a row must have; None accepts any length.

    Raises:
        ValueError: A source is empty, rows of different length or masking are mixed, or their length is not `length`.
    """

    def __init__(self, sources: tuple[DataSource, ...], seed: int, total: int, length: int | None = None) -> None:
        self.seed = seed
        self.folders = [PackedRows(source.rows) for source in sources]
        for source, rows in zip(sources, self.folders, strict=True):
            if not len(rows):
                raise ValueError(f"{source.rows} holds no row. Pack more documents, or use a shorter row length.")
        kinds = {(rows.length, rows.mask_documents): rows.folder for rows in self.folders}
        if len(kinds) > 1:
            found = "; ".join(f"{folder}: length {n}, document mask {mask}" for (n, mask), folder in kinds.items())
            raise ValueError(f"All sources of a run must share row length and document mask, found {found}.")
        self.length, self.mask_documents = self.folders[0].length, self.folders[0].mask_documents
        if length is not None and length != self.length:
            raise ValueError(
                f"The config says length: {length}, the rows in {self.folders[0].folder} have {self.length} tokens. "
                f"Pack rows of {length} (ultralong pack ... --length {length}), or set length={self.length}."
            )
        weights = np.array([source.weight for source in sources])
        draws = np.random.default_rng(seed).choice(len(sources), size=total, p=weights / weights.sum())
        self._source = draws  # (total,)
        self._turn = np.zeros(total, dtype=np.int64)  # (total,) how often the source was drawn before
        for number in range(len(sources)):
            chosen = draws == number
            self._turn[chosen] = np.arange(chosen.sum())

    def place(self, index: int) -> Place:
        """The run's row number `index`."""
        source = int(self._source[index])
        turn, size = int(self._turn[index]), len(self.folders[source])
        key = (self.seed * 1_000_003 + source) * 1_000_003 + turn // size
        return Place(source, int(permuted(np.array([turn % size]), size, key)[0]))

    def batch(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count - 1` of the run as one batch."""
        places = tuple(self.place(index) for index in range(first, first + count))
        return collate([self.folders[place.source][place.row] for place in places], places, self.mask_documents)

    def describe(self, place: Place) -> str:
        """A row's source and the documents in it, for messages."""
        rows = self.folders[place.source]
        documents = rows[place.row].document_ids.tolist()
        shown = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        return f"{rows.folder} row {place.row} (documents {shown})"


def collate(rows: list[PackedRow], places: tuple[Place, ...], mask_documents: bool) -> Batch:
    """Put rows together. Under a document mask they are laid end to end and only their boundaries keep them apart."""
    stacked = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))  # (B, T)
        for name in ("input_ids", "labels", "position_ids")
    }
    length = len(rows[0].input_ids)
    boundaries = None
    if mask_documents:
        stacked = {name: tensor.reshape(1, -1) for name, tensor in stacked.items()}  # (1, B * T)
        starts = [row.boundaries[:-1].astype(np.int64) + number * length for number, row in enumerate(rows)]
        boundaries = torch.from_numpy(np.append(np.concatenate(starts), len(rows) * length)).to(torch.int32)
    return Batch(**stacked, boundaries=boundaries, places=places, row_length=length)
