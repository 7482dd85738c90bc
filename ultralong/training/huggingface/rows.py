"""Rows for a trainer whose data loader knows nothing of context parallelism.

accelerate's loader gives batch `n * W + p` to process p of W. With each row as often in the dataset, one after another,
as processes share it, neighbours get the same row, and a step sees as many different rows as there are groups.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource
from ultralong.utils.extras import require


def packed_rows(folders: Sequence[str | os.PathLike[str] | DataSource], count: int, seed: int = 0) -> Any:
    """Packed rows in the order in which a run of `ultralong train` reads them, as a dataset of the `datasets` library.

    A row is read from its folder when it is asked for, so that the dataset itself holds numbers only.

    Args:
        folders: What `ultralong pack` wrote, or sources with weights.
        count: Rows that training will read; steps times rows of a step.
        seed: Of the order, as `seed` of a training config.

    Returns:
        A dataset of `input_ids` and `shift_labels`, (T,) each, `position_ids`, and `boundaries` of documents where they
        don't see each other.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: A folder holds no rows, or the rows don't fit together.
    """
    sources = tuple(x if isinstance(x, DataSource) else DataSource(os.fspath(x)) for x in folders)
    order = RowOrder(sources, seed, count)

    def read(wanted: dict[str, list[int]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "shift_labels": [], "position_ids": [], "boundaries": []}
        for batch in (order.batch(index, 1) for index in wanted["row"]):
            found["input_ids"].append(batch.input_ids[0].numpy())
            found["shift_labels"].append(batch.labels[0].numpy())
            found["position_ids"].append(batch.position_ids[0].numpy())
            found["boundaries"].append(None if batch.boundaries is None else batch.boundaries.numpy())
        return found

    rows = require("datasets", "data").Dataset.from_dict({"row": np.arange(count)})
    return rows.with_transform(read)


class _Repeated(Dataset[Any]):
    def __init__(self, rows: Any, times: int) -> None:
        self.rows, self.times = rows, times

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __getitem__(self, index: int) -> Any:
        return self.rows[index // self.times]


def shared_rows(rows: Any, context_parallel_size: int) -> Any:
    """A dataset in which each row comes as often, one after another, as processes share it.

    Args:
        rows: A dataset of the `datasets` library, or anything with a length and rows by number.
        context_parallel_size: Processes that share a row.

    Raises:
        ValueError: The size is below 1.
    """
    if context_parallel_size < 1:
        raise ValueError(f"context_parallel_size must be 1 or more, found {context_parallel_size}.")
    if hasattr(rows, "select"):  # stays a dataset of that library, which SFTTrainer asks for
        return rows.select(np.repeat(np.arange(len(rows)), context_parallel_size))
    return _Repeated(rows, context_parallel_size)
