"""What the packed rows of a run say of its work: their length, and their documents where those don't see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.training.config import DataSource

SAMPLED = 32  # rows whose documents are looked at, evenly over the folders


@dataclass(frozen=True)
class PlannedRows:
    """Rows of a run.

    Attributes:
        length: Tokens of a row.
        documents: Boundaries of some rows, each from 0 to `length`; None where every token sees all before it.
    """

    length: int
    documents: tuple[tuple[int, ...], ...] | None


def planned_rows(sources: Sequence[DataSource]) -> PlannedRows | None:
    """Look at the folders of packed rows; None where the first of them does not exist yet.

    Each folder is looked at as often as the run draws from it.
    """
    folders = [Path(source.rows) for source in sources]
    if not (folders[0] / "manifest.json").is_file():
        return None
    first = PackedRows(folders[0])
    if not first.mask_documents:
        return PlannedRows(first.length, None)
    total, found = sum(source.weight for source in sources), []
    for source, folder in zip(sources, folders, strict=True):
        rows = PackedRows(folder) if (folder / "manifest.json").is_file() else first
        count = min(len(rows), max(1, round(SAMPLED * source.weight / total)))
        # From the middle of equal parts: the last row, which may be padding for the most part, is one row of all.
        for part in range(count):
            found.append(tuple(rows[(2 * part + 1) * len(rows) // (2 * count)].boundaries.tolist()))
    return PlannedRows(first.length, tuple(found))
