"""Which rows a step trains on, and how rows become the tensors of one forward pass.

B rows at once, T tokens a row. The order is a pure function of the seed and the step: nothing has to be saved to resume
at the exact row, and the number of processes does not change what a step sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ultralong.data.rows.packed_rows import PackedRow, PackedRows
from ultralong.data.rows.permutation import permuted
from ultralong.data.rows.short_contexts import LongCEConfig
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
        skips: Whether positions jump inside the rows (`skipped_positions`), which are one text each all the same.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    boundaries: Tensor | None
    places: tuple[Place, ...]
    row_length: int
    skips: bool = False


class RowOrder:
    """The rows of a run in order: each source in passes of its own pseudo-random order, sources drawn by weight.

    Args:
        sources: Where rows come from.
        seed: Names the order.
        total: Rows the whole run draws.
        length: Tokens that a row must have; None accepts any length.
        skip_to: Positions that rows are spread over (`skipped_positions`); None leaves them as they are.

    Raises:
        ValueError: A source is empty, rows of different length or masking are mixed, their length is not `length`, or
            positions can't be skipped in them.
    """

    def __init__(
        self,
        sources: tuple[DataSource, ...],
        seed: int,
        total: int,
        length: int | None = None,
        skip_to: int | None = None,
    ) -> None:
        self.seed, self.skip_to = seed, skip_to
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
        if skip_to is not None:
            check_skipping(self.folders, skip_to)
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
        batch = collate([self.folders[place.source][place.row] for place in places], places, self.mask_documents)
        if self.skip_to is None:
            return batch
        rows = [skipped_positions(self.length, self.skip_to, self.seed, first + number) for number in range(count)]
        return replace(batch, position_ids=torch.from_numpy(np.stack(rows)), skips=True)

    def describe(self, place: Place) -> str:
        """A row's source and the documents in it, for messages."""
        rows = self.folders[place.source]
        documents = rows[place.row].document_ids.tolist()
        shown = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        return f"{rows.folder} row {place.row} (documents {shown})"


def skipped_positions(length: int, to: int, seed: int, index: int) -> np.ndarray:
    """Positions of one row whose second chunk stands later: every distance of a long window comes up in short rows.

    PoSE (arXiv 2309.10400) with two chunks, drawn as its training script draws them: the first has 1 to half of the
    tokens and stands at the start, the second skips 0 to all that is left. The text itself stays connected.

    Args:
        length: T, tokens of the row.
        to: Positions are below this.
        seed: The run's.
        index: The row's number in the run; with the seed it decides, so that a resumed run draws the same.

    Returns:
        (T,) int64, rising.
    """
    draw = np.random.default_rng((seed, index))
    cut = int(draw.integers(1, (length + 1) // 2, endpoint=True))
    skip = int(draw.integers(0, to - length, endpoint=True))
    positions = np.arange(length, dtype=np.int64)
    positions[cut:] += skip
    return positions


def check_skipping(folders: Sequence[PackedRows], to: int) -> None:
    """Refuse rows whose positions can't be skipped.

    Raises:
        ValueError: They are longer than `to`, of one token, or of documents that do not see each other.
    """
    for rows in folders:
        if rows.mask_documents or rows.restart_positions:
            raise ValueError(
                f"skip_positions_to cuts whole rows in two, and documents in {rows.folder} do not see each other. Pack "
                "them with mask_documents: false and positions: row, or leave skip_positions_to out."
            )
        if not 1 < rows.length <= to:
            raise ValueError(
                f"skip_positions_to is {to:,}, the rows in {rows.folder} have {rows.length:,} tokens: it must be as "
                "much or more, and a row 2 tokens at least."
            )


def longest_position(rows: PackedRows) -> int:
    """Positions that a folder's rows use: their length, or the longest document where each starts at 0 again."""
    return _longest_document(rows) if rows.restart_positions else rows.length


def _longest_document(rows: PackedRows) -> int:
    longest = 0
    for shard in rows.segments():
        ends = np.append(shard[1:, 1], 0)
        ends[np.append(shard[1:, 0] != shard[:-1, 0], True)] = rows.length
        longest = max(longest, int((ends - shard[:, 1]).max(initial=0)))
    return longest


def check_long_ce(folders: Sequence[PackedRows], weights: LongCEConfig) -> str:
    """Refuse rows in which LongCE would weigh nothing; returns what it weighs.

    Raises:
        ValueError: Their texts are no longer than a short context and its stride.
    """
    for rows in folders:
        reach = _longest_document(rows) if rows.mask_documents else rows.length
        if reach < weights.shortest:
            text = "Documents, which see no other," if rows.mask_documents else "Rows"
            raise ValueError(
                f"{text} have up to {reach:,} tokens in {rows.folder}, and long_ce weighs what stands in "
                f"{weights.shortest:,} (short_context and stride) or more: nothing would be weighted. Set "
                "long_ce.short_context and long_ce.stride lower, or long_ce.weight_cap=0."
            )
    return f"targets behind {weights.short_context:,} tokens and more are weighted by up to {weights.weight_cap:g}"


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
    ids, labels, positions = stacked["input_ids"], stacked["labels"], stacked["position_ids"]
    return Batch(ids, labels, positions, boundaries=boundaries, places=places, row_length=length)
