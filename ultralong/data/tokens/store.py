"""Reading a token store: document i as an array, and nothing else of its shard."""

from __future__ import annotations

import json
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.data.tokens.encoding import check_same_tokenizer
from ultralong.data.tokens.shards import check_size, read_record
from ultralong.data.tokens.stored import StoredArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "ultralong-tokens-1"


class TokenStore:
    """Tokenised documents on disk. `len(store)` documents; `store[i]` is the ids of document i.

    Args:
        folder: What `tokenize_corpus` wrote.

    Raises:
        ValueError: The folder holds no finished store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise ValueError(
                f"{folder} holds no finished token store (no manifest.json). Run the tokenising step again: it "
                "goes on where it stopped."
            )
        self.manifest: dict[str, Any] = read_record(path)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {self.manifest.get('format')!r}, expected {FORMAT!r}.")
        self.dtype = np.dtype(self.manifest["dtype"])
        self._first = np.cumsum([0] + [shard["documents"] for shard in self.manifest["shards"]])
        self._open: dict[int, tuple[StoredArray, StoredArray]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return self.manifest["tokens"]

    def __len__(self) -> int:
        return self.manifest["documents"]

    def __getitem__(self, index: int) -> np.ndarray:
        ids, offsets, local = self._locate(index)
        first, last = offsets[local : local + 2]
        return ids[int(first) : int(last)]

    def length(self, index: int) -> int:
        """Tokens in document `index`, without touching them."""
        _, offsets, local = self._locate(index)
        first, last = offsets[local : local + 2]
        return int(last - first)

    def describe(self, index: int) -> dict[str, str]:
        """Id, source and licence of document `index`. Keeps the lists of the last shards in memory: for looking."""
        index = self._checked(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        name = self.manifest["shards"][shard]["shard"]
        path = self.folder / f"{name}.documents.jsonl"
        lines = _listed(path, path.stat().st_mtime_ns)
        if index - self._first[shard] >= len(lines):
            raise ValueError(f"{name}.documents.jsonl in {self.folder} is shorter than its shard. Build it again.")
        return json.loads(lines[index - self._first[shard]])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, (documents,) int64: 8 bytes a document in memory."""
        folder, shards = self.folder, self.manifest["shards"]
        for shard in shards:
            check_files(folder, shard)
        parts = [np.diff(np.load(folder / f"{shard['shard']}.offsets.npy")) for shard in shards]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer other than the one the store was made with.

        Raises:
            ValueError: They differ.
        """
        check_same_tokenizer(self.manifest["tokenizer"], tokenizer, str(self.folder))

    def release(self) -> None:
        """Close the shards' files; they are opened again when touched."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return index % len(self)

    def _locate(self, index: int) -> tuple[StoredArray, StoredArray, int]:
        index = self._checked(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        if shard not in self._open:
            name = self.manifest["shards"][shard]["shard"]
            check_files(self.folder, self.manifest["shards"][shard])
            ids = StoredArray(self.folder / f"{name}.bin", self.dtype)
            self._open[shard] = (ids, StoredArray(self.folder / f"{name}.offsets.npy"))
        ids, offsets = self._open[shard]
        return ids, offsets, int(index - self._first[shard])


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a shard whose files do not have the sizes in its record, before they are opened.

    Raises:
        ValueError: A file is missing or of another size.
    """
    for name, expected in record["files"].items():
        if (wrong := check_size(folder / name, expected)) is not None:
            raise ValueError(f"{wrong}. Run the command that made {folder} again: it makes it whole.")


@lru_cache(maxsize=4)
def _listed(path: Path, written: int) -> list[bytes]:
    # Split at bytes: an id may hold a separator such as U+2028 that str.splitlines would split at too.
    return path.read_bytes().split(b"\n")[:-1]
