"""Which rows a step trains on, and how rows become the tensors of one forward pass.

B rows at once, T tokens a row. The order is a pure function of the seed and the step: nothing has to be saved to resume
at the exact row, and the number of processes does not change what a step sees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ultralong.data.rows.packed_rows import IGNORE, LARGEST_TOKEN, PackedRow, PackedRows
from ultralong.data.rows.permutation import permuted
from ultralong.data.rows.row_checks import check_rows, check_skipping
from ultralong.data.rows.step_packs import step_packs
from ultralong.training.config import DataSource, TrainConfig
from ultralong.training.throughput import query_key_pairs

EMPTY = 128  # tokens of padding in the pass of a group that has no row left


@dataclass(frozen=True)
class Place:
    """One row: which source, which row of it."""

    source: int
    row: int


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass, before they are split over context-parallel processes.

    Attributes:
        input_ids: (B, T); with a document mask the rows are laid end to end, (1, B * T), as they are in a pack.
        labels: As `input_ids`, already shifted, -100 for no target.
        position_ids: As `input_ids`.
        boundaries: (N + 1,) int32 cumulative document lengths where attention must not cross documents, else None.
        places: Where the rows came from, to name them when something goes wrong.
        rows: Of each row the tokens that are here and its length; they differ where padding is left out.
        skips: Whether positions jump inside the rows (`skipped_positions`), which are one text each all the same.
        anchors: First tokens of the rows, which all documents of the row see; none where documents share nothing.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    boundaries: Tensor | None
    places: tuple[Place, ...]
    rows: tuple[tuple[int, int], ...]
    skips: bool = False
    anchors: tuple[int, ...] = ()

    def position_buckets(self, count: int) -> Tensor:
        """Which of `count` equal stretches of its row each token lies in, as `input_ids`."""
        parts = [torch.arange(kept) * count // length for kept, length in self.rows]
        return torch.cat(parts).view(self.input_ids.shape)


@dataclass(frozen=True)
class StepPacks:
    """How the rows of one step are packed.

    Attributes:
        passes: For every pass and context-parallel group the rows it reads; none where a group has none left.
        tokens: Tokens of the step, padding left out.
        pairs: Query-key pairs of the step.
    """

    passes: tuple[tuple[tuple[Place, ...], ...], ...]
    tokens: int
    pairs: float


class RowOrder:
    """The rows of a run in order: each source in passes of its own pseudo-random order, sources drawn by weight.

    Args:
        sources: Where rows come from.
        seed: Names the order.
        total: Rows the whole run draws.
        length: Tokens that a row must have; None accepts any length.
        skip_to: Positions that rows are spread over (`skipped_positions`); None leaves them as they are.
        mixed: Rows of different lengths and masks are allowed; batches are then packs (`packs`).
        skipped: Rows at the start of the order that are left out.

    Attributes:
        length: Tokens of a row, of the longest where they differ.
        anchor: The token that takes the place of each masked row's first one and is shared; None shares nothing.
        end_to_end: Whether a batch is (1, N): under a document mask, and where rows are mixed.

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
        mixed: bool = False,
        skipped: int = 0,
    ) -> None:
        self.seed, self.skip_to, self.skipped = seed, skip_to, skipped
        self.anchor: int | None = None
        self.folders = [PackedRows(source.rows) for source in sources]
        check_rows(self.folders, length, mixed)
        self.length = max(rows.length for rows in self.folders)
        self.mask_documents = all(rows.mask_documents for rows in self.folders)
        self.end_to_end = self.mask_documents or mixed
        if skip_to is not None:
            check_skipping(self.folders, skip_to)
        weights = np.array([source.weight for source in sources])
        # More draws begin with the same ones, so the order does not depend on where a run begins or ends.
        draws = np.random.default_rng(seed).choice(len(sources), size=skipped + total, p=weights / weights.sum())
        self._source = draws  # (skipped + total,)
        self._turn = np.zeros(len(draws), dtype=np.int64)  # (skipped + total,) how often the source was drawn before
        for number in range(len(sources)):
            chosen = draws == number
            self._turn[chosen] = np.arange(chosen.sum())

    @classmethod
    def of_run(cls, config: TrainConfig) -> RowOrder:
        """The rows of a whole run."""
        rows, mixed = config.steps * config.global_batch_size, config.parallel.dynamic
        return cls(config.data, config.seed, rows, config.length, config.skip_positions_to, mixed, config.skip_rows)

    def content(self) -> list[str]:
        """What tells the rows of each source from any others: a hash of the sizes and hashes of their files."""
        kept = []
        for rows in self.folders:
            # Their largest token is left out: it follows from the files, and earlier versions did not record it.
            shards = [{key: shard[key] for key in shard if key != LARGEST_TOKEN} for shard in rows.manifest["shards"]]
            kept.append([rows.length, rows.mask_documents, shards])
        return [hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest() for each in kept]

    def place(self, index: int) -> Place:
        """The run's row number `index`."""
        source = int(self._source[self.skipped + index])
        turn, size = int(self._turn[self.skipped + index]), len(self.folders[source])
        key = (self.seed * 1_000_003 + source) * 1_000_003 + turn // size
        return Place(source, int(permuted(np.array([turn % size]), size, key)[0]))

    def batch(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count - 1` of the run as one batch."""
        places = tuple(self.place(index) for index in range(first, first + count))
        batch = collate([self.folders[place.source][place.row] for place in places], places, self.mask_documents)
        if self.skip_to is None:
            return self._anchored(batch)
        numbers = range(self.skipped + first, self.skipped + first + count)
        rows = [skipped_positions(self.length, self.skip_to, self.seed, number) for number in numbers]
        return replace(batch, position_ids=torch.from_numpy(np.stack(rows)), skips=True)

    def documents(self, place: Place) -> tuple[int, ...]:
        """Boundaries of what sees no other inside a row: its documents, or all of it; padding is left out."""
        rows = self.folders[place.source]
        edges = rows.documents(place.row)
        return edges if rows.mask_documents else (0, edges[-1])

    def packs(self, first: int, count: int, groups: int, most: int, token_work: float) -> StepPacks:
        """Rows `first` to `first + count - 1` of the run as packs of about equal work.

        Args:
            first: The first row.
            count: Rows of the step.
            groups: Context-parallel groups.
            most: Most tokens of a pack.
            token_work: What a token costs beside attention, in query-key pairs.
        """
        places = [self.place(index) for index in range(first, first + count)]
        documents = [self.documents(place) for place in places]
        lengths, pairs = [edges[-1] for edges in documents], [query_key_pairs(0, edges) for edges in documents]
        work = [length * token_work + seen for length, seen in zip(lengths, pairs, strict=True)]
        passes = step_packs(lengths, work, groups, most)
        named = tuple(tuple(tuple(places[row] for row in pack) for pack in each) for each in passes)
        return StepPacks(named, sum(lengths), sum(pairs))

    def most_pack_tokens(self, config: TrainConfig) -> int:
        """Most tokens of a pack, over the processes that share it: as many as the longest row has, if none is said."""
        most = config.parallel.max_tokens_per_rank
        return self.length if most is None else most * config.parallel.shared_by

    def boundaries(self, places: tuple[Place, ...]) -> tuple[int, ...]:
        """Boundaries of a pack of rows."""
        return tuple(_end_to_end([self.documents(place) for place in places]).tolist())

    def pack(self, places: tuple[Place, ...]) -> Batch:
        """Rows of any lengths laid end to end, without their padding; one of nothing but padding for none."""
        if not places:
            ids = torch.zeros((1, EMPTY), dtype=torch.int64)
            edges = torch.tensor([0, EMPTY], dtype=torch.int32)
            return Batch(ids, torch.full_like(ids, IGNORE), ids, edges, places, ((EMPTY, EMPTY),))
        rows = [self.folders[place.source][place.row] for place in places]
        documents = [self.documents(place) for place in places]
        kept = tuple((edges[-1], len(row.input_ids)) for row, edges in zip(rows, documents, strict=True))
        ids, labels, positions = (
            torch.from_numpy(np.concatenate([getattr(row, name)[:n] for row, (n, _) in zip(rows, kept, strict=True)]))
            for name in ("input_ids", "labels", "position_ids")
        )
        return self._anchored(Batch(ids[None], labels[None], positions[None], _end_to_end(documents), places, kept))

    def _anchored(self, batch: Batch) -> Batch:
        """A batch of rows end to end whose first tokens are shared, where that is asked for."""
        if self.anchor is None:
            return batch
        starts = np.cumsum([0, *(kept for kept, _ in batch.rows[:-1])]).tolist()
        masked = [s for s, at in zip(starts, batch.places, strict=True) if self.folders[at.source].mask_documents]
        batch.input_ids[:, masked] = self.anchor
        return replace(batch, anchors=tuple(starts))

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
        index: The row's number in the order; with the seed it decides, so that a resumed run draws the same.

    Returns:
        (T,) int64, rising.
    """
    draw = np.random.default_rng((seed, index))
    cut = int(draw.integers(1, (length + 1) // 2, endpoint=True))
    skip = int(draw.integers(0, to - length, endpoint=True))
    positions = np.arange(length, dtype=np.int64)
    positions[cut:] += skip
    return positions


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
        boundaries = _end_to_end([row.boundaries for row in rows])
    ids, labels, positions = stacked["input_ids"], stacked["labels"], stacked["position_ids"]
    return Batch(ids, labels, positions, boundaries, places, rows=((length, length),) * len(rows))


def _end_to_end(documents: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """Boundaries (N + 1,) int32 of rows laid end to end, from each row's own."""
    edges = np.concatenate([np.diff(np.asarray(each, dtype=np.int64)) for each in documents]).cumsum()
    return torch.from_numpy(np.append(0, edges)).to(torch.int32)
