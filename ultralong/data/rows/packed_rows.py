"""Packed rows on disk and how to read them: the one format that training, evaluation and SFT share.

T tokens per row, N documents (or parts of one) in a row.

A folder holds, for every shard of rows, `rows-NNNNN.npy` of shape (rows, T + 1): T inputs and, as the last column, the
token that follows the row in the stream, so that the row's last input has a target too. The type's largest value means
"no token". `rows-NNNNN.segments.npy` of shape (segments, 3) lists row, first token and document of every segment; where
only some tokens are targets (SFT), `rows-NNNNN.targets.npy` of shape (rows, ceil(T / 8)) holds one bit for each input.
Labels and positions follow from these, so they are made when a row is read and cost no disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ultralong.data.tokens.shards import ShardFolder, read_record
from ultralong.data.tokens.store import check_files
from ultralong.data.tokens.stored import StoredArray

FORMAT = "ultralong-rows-1"
IGNORE = -100  # the label PyTorch's cross entropy leaves out
PADDING = -1  # the document id of a row's padding
NPY_HEADER_BYTES = 128
LARGEST_TOKEN = "largest_token"  # of a shard's record; earlier versions wrote none


def _is_shard(record: Any) -> bool:
    """Whether an entry of a manifest tells a shard's rows and files."""
    fits = isinstance(record, dict) and type(record.get("rows")) is int and isinstance(record.get("shard"), str)
    return fits and isinstance(record.get("files"), dict)


# What a manifest must say, and how.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "length": lambda value: type(value) is int and value > 0,
    "mask_documents": lambda value: isinstance(value, bool),
    "positions": lambda value: value in ("row", "document"),
    "rows": lambda value: type(value) is int and value >= 0,
    "shards": lambda value: isinstance(value, list) and all(map(_is_shard, value)),
    "tokenizer": lambda value: isinstance(value, dict) and type(value.get("vocabulary")) is int,
}


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One packed row as numpy arrays, ready for a model that does not shift labels itself.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64; `labels[t]` is the token to predict from `input_ids[: t + 1]`, -100 where there is none.
        position_ids: (T,) int64; 0..T-1, or starting again at every segment.
        boundaries: (N + 1,) int32, where segments start, from 0 to T: cumulative lengths as variable-length attention
            wants them. A separator belongs to the segment before it.
        document_ids: (N,) int64, the token store's document of each segment (for chat, the example); -1 for padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    boundaries: np.ndarray
    document_ids: np.ndarray

    def document_of_token(self) -> np.ndarray:
        """(T,) int64: the document id of every token."""
        return np.repeat(self.document_ids, np.diff(self.boundaries))


class PackedRows:
    """Rows in a folder, read one at a time. `len(rows)`, `rows[i]`; safe to hand to DataLoader workers.

    Args:
        folder: What `pack` or `pack_chat` wrote.

    Attributes:
        manifest: Settings, counts, sources and licences.
        length: Tokens per row, T.
        mask_documents: True when attention must not cross `row.boundaries`.

    Raises:
        ValueError: The folder holds no finished rows.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not self.folder.exists():
            raise ValueError(f"There is no folder {folder}: rows are written by ultralong pack.")
        if not path.exists():
            raise ValueError(
                f"{folder} holds no finished rows (no manifest.json). Run the packing step again: it "
                "resumes where it stopped."
            )
        self.manifest: dict[str, Any] = read_record(path)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {self.manifest.get('format')!r}, expected {FORMAT!r}.")
        if wrong := [key for key, fits in FIELDS.items() if not fits(self.manifest.get(key))]:
            raise ValueError(f"{path} has a {wrong[0]} of {self.manifest.get(wrong[0])!r:.60}. Pack the rows again.")
        self.length: int = self.manifest["length"]
        self.mask_documents: bool = self.manifest["mask_documents"]
        self.restart_positions: bool = self.manifest["positions"] == "document"
        self._first = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])
        if self._first[-1] != self.manifest["rows"]:
            raise ValueError(
                f"{path} counts {self.manifest['rows']} rows, its shards hold {self._first[-1]}. Pack the rows again."
            )
        self._open: dict[int, dict[str, StoredArray]] = {}

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __getitem__(self, index: int) -> PackedRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._row(shard, int(index - self._first[shard]))

    def check_files(self) -> None:
        """Refuse rows of which a file is missing or cut, without reading any of them.

        Raises:
            ValueError: Names the file.
        """
        for record in self.manifest["shards"]:
            check_files(self.folder, record)

    def documents(self, index: int) -> tuple[int, ...]:
        """Where documents start in a row and where the last one ends: cumulative lengths without the row's padding.

        No token is read. A row of nothing but padding counts as one document of one token.
        """
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        segments = self._segments(shard, int(index - self._first[shard]))
        starts = segments[:, 1].tolist()
        if segments[-1, 2] == PADDING:
            return tuple(starts) if len(starts) > 1 else (0, 1)
        return (*starts, self.length)

    def segments(self) -> Iterator[np.ndarray]:
        """The segments of each shard, (segments, 3): row of the shard, first token, document."""
        for shard in range(len(self.manifest["shards"])):
            yield self._files(shard)["segments"][:]

    def release(self) -> None:
        """Close the shards' files; they are opened again when touched."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _files(self, shard: int) -> dict[str, StoredArray]:
        if shard not in self._open:
            record = self.manifest["shards"][shard]
            check_files(self.folder, record)
            endings = [name.removeprefix(f"{record['shard']}.").removesuffix("npy") for name in record["files"]]
            self._open[shard] = {
                ending.rstrip("."): StoredArray(self.folder / f"{record['shard']}.{ending}npy") for ending in endings
            }
        return self._open[shard]

    def _segments(self, shard: int, local: int) -> np.ndarray:
        """The segments of one row, (N, 3)."""
        found = self._files(shard)["segments"]
        return found[found.first_at_least(local) : found.first_at_least(local + 1)]

    def _row(self, shard: int, local: int) -> PackedRow:
        files, segments = self._files(shard), self._segments(shard, local)
        stored = files[""][local]  # (T + 1,)
        starts, documents = segments[:, 1], segments[:, 2].astype(np.int64)
        boundaries = np.append(starts, self.length).astype(np.int32)
        labels = stored[1:].astype(np.int64)
        labels[stored[1:] == np.iinfo(stored.dtype).max] = IGNORE
        if self.mask_documents:
            labels[boundaries[1:-1] - 1] = IGNORE
        if "targets" in files:
            labels[np.unpackbits(files["targets"][local], count=self.length) == 0] = IGNORE
        if documents[-1] == PADDING:
            labels[max(0, boundaries[-2] - 1) :] = IGNORE
        positions = np.arange(self.length, dtype=np.int64)
        if self.restart_positions:
            positions -= np.repeat(boundaries[:-1], np.diff(boundaries))
        return PackedRow(stored[:-1].astype(np.int64), labels, positions, boundaries, documents)


class RowWriter:
    """Writes rows shard by shard through a `ShardFolder`, inside a `with`; only a shard's segment list is in memory.

    Args:
        folder: Where they go.
        length: T.
        dtype: Type of a token id on disk.
        rows_per_shard: A shard ends after this many rows.
        number: Number of the first shard to write.
        targets: True when `append` is given target bits.
    """

    largest: int  # token of the shard

    def __init__(
        self,
        folder: ShardFolder,
        length: int,
        dtype: np.dtype,
        rows_per_shard: int,
        number: int = 0,
        targets: bool = False,
    ) -> None:
        self.folder, self.length, self.dtype = folder, length, dtype
        self.rows_per_shard, self.number, self.targets = rows_per_shard, number, targets
        self.stream: BinaryIO | None = None
        self._reset()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            self.stream.close()
            self.folder.partial(self.number, "npy").unlink(missing_ok=True)

    @property
    def full(self) -> bool:
        """True when the shard holds all its rows and wants `commit`."""
        return self.rows == self.rows_per_shard

    def append(
        self, ids: np.ndarray, starts: list[int], documents: list[int], targets: np.ndarray | None = None
    ) -> None:
        """Add one row.

        Args:
            ids: (T + 1,) of the writer's dtype.
            starts: First token of each segment; the first is 0.
            documents: Document of each segment.
            targets: (T,) bool, which inputs have a target, when the writer was made with `targets`.
        """
        assert (ids.shape, ids.dtype, starts[0]) == ((self.length + 1,), self.dtype, 0)
        if self.stream is None:
            self.stream = open(self.folder.partial(self.number, "npy"), "wb")  # noqa: SIM115 - closed by commit or exit
            self.stream.write(bytes(NPY_HEADER_BYTES))
        self.stream.write(ids.data)
        known = ids[:-1] if ids[-1] == np.iinfo(self.dtype).max else ids
        self.largest = max(self.largest, int(known.max()))
        self.segments.extend((self.rows, start, document) for start, document in zip(starts, documents, strict=True))
        if self.targets:
            assert targets is not None
            self.bits.append(np.packbits(targets))
        self.rows += 1

    def commit(self, record: dict[str, Any]) -> dict[str, Any]:
        """Make the shard whole; the next row opens a new one."""
        assert self.stream is not None
        self.stream.seek(0)
        self.stream.write(_npy_header((self.rows, self.length + 1), self.dtype))
        self.stream.close()
        arrays = {"segments.npy": np.array(self.segments, dtype="<i8").reshape(-1, 3)}
        if self.targets:
            arrays["targets.npy"] = np.array(self.bits, dtype=np.uint8)
        for ending, array in arrays.items():
            with open(self.folder.partial(self.number, ending), "wb") as stream:
                np.save(stream, array)
        partials = {ending: self.folder.partial(self.number, ending) for ending in ("npy", *arrays)}
        record = self.folder.commit(self.number, partials, {"rows": self.rows, LARGEST_TOKEN: self.largest, **record})
        self.number += 1
        self._reset()
        return record

    def _reset(self) -> None:
        self.rows = self.largest = 0
        self.stream = None
        self.segments: list[tuple[int, int, int]] = []
        self.bits: list[np.ndarray] = []


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """A .npy header of fixed size, so that the number of rows can be filled in after the rows were written."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    start = b"\x93NUMPY\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    header = start + text.encode().ljust(NPY_HEADER_BYTES - len(start) - 1) + b"\n"
    assert len(header) == NPY_HEADER_BYTES
    return header
