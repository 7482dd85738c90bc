"""Datasets of the `datasets` library: a folder on this machine, or an id on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.utils.extras import require
from ultralong.utils.words import expand_home


@dataclass(frozen=True)
class Dataset:
    """A dataset of the `datasets` library: an id on the hub (streamed), or a folder.

    Attributes:
        id: Its id on the hub, a folder that `save_to_disk` wrote, or a folder of JSON lines or Parquet files.
        split: Which split.
        config: Which configuration, where it has several.
        revision: Branch, tag or commit.
        data_files: Only these of its files (a shell pattern).
        shuffle_buffer: Rows held to be given out in random order, files shuffled too, by the recipe's seed; 0 keeps
            the order. A row's number, and so its id, is then its place in that order.
    """

    id: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    shuffle_buffer: int = 0

    def __post_init__(self) -> None:
        expand_home(self, "id")


def dataset_rows(
    dataset: Dataset, seed: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row) of every row of part i of n of a dataset.

    Args:
        dataset: Which.
        seed: Decides on the order, where rows are shuffled.
        part: (i, n): each n-th row, beginning with the i-th.

    Raises:
        ValueError: There is no such dataset or split.
    """
    id, split = dataset.id, dataset.split
    datasets = require("datasets", extra="data")
    place = ""
    try:
        rows = _opened(datasets, dataset)
        if dataset.shuffle_buffer:
            streamed = isinstance(rows, datasets.IterableDataset)
            rows = rows.shuffle(seed, **({"buffer_size": dataset.shuffle_buffer} if streamed else {}))
        if part[1] > 1:
            rows = require("datasets.distributed", extra="data").split_dataset_by_node(rows, *part)
            place = f"{part[0]}of{part[1]}:"
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"dataset {id!r}, split {split!r} cannot be opened: {error}") from error
    # Names decide on what is kept: a folder that is moved must give the same corpus.
    folder = Path(id)
    name = folder.resolve().name if folder.is_dir() else id
    stream, number = iter(rows), 0
    while True:
        try:
            row = next(stream, None)
        except Exception as error:
            # The library ends its stream with an error of any type (of Arrow, of its own, of the network).
            raise ValueError(
                f"dataset {id!r}, split {split!r} cannot be read beyond row {number:,}: {_reason(error)}. It is read "
                "as one table, where a column has one type; with `path` to its files, single rows can be left out."
            ) from error
        if row is None:
            return
        yield f"{name}:{place}{number}", row
        number += 1


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom, which says which column or file it was."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0][:200]}" if told else type(error).__name__


def _opened(datasets: Any, dataset: Dataset) -> Any:
    """The rows of a split, in the library's own form."""
    folder = Path(dataset.id)
    if folder.is_dir() and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        rows = datasets.load_from_disk(dataset.id)
        return rows[dataset.split] if isinstance(rows, dict) else rows
    return datasets.load_dataset(
        dataset.id,
        dataset.config,
        split=dataset.split,
        revision=dataset.revision,
        data_files=dataset.data_files,
        streaming=True,
    )
