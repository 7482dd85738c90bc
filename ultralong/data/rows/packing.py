"""Separator packing: one endless stream of documents, cut into rows of exactly T tokens.

T tokens per row.

The recipe (arXiv 2504.06214) joins documents by the string `<s>` and lets attention run across them. In Llama-3 `<s>`
is no special token: alone it is the two tokens '<s' and '>', inside running text it merges with its neighbours. So the
separator is encoded once, alone, and its ids are put between documents that were tokenised on their own.

What the stream of documents becomes:
* join="separator": d1 sep d2 sep d3; join="none": d1 d2 d3; join="bos_eos": bos d1 eos bos d2 eos bos d3 eos.
  A separator belongs to the document before it, which has to learn where to end.
* The stream is cut every T tokens, wherever that is; what is over goes on in the next row, or is left out with
  `row_end="drop"`: every row then starts with a document. `long_documents="drop"` leaves out documents of more than T
  tokens.
* The target of input t is the stream's token t + 1, for the row's last input too. With `mask_documents`, nothing is
  predicted across a document's start, and positions start again there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.data.rows.packed_rows import FORMAT, PADDING, PackedRow, PackedRows, RowWriter
from ultralong.data.rows.permutation import permuted
from ultralong.data.rows.separators import PackSettings, Separators, resolve_separators
from ultralong.data.tokens.shards import ShardFolder
from ultralong.data.tokens.store import TokenStore
from ultralong.utils.files import locked, sha256
from ultralong.utils.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PackSettings", "PackedRow", "PackedRows", "RowStream", "Separators", "pack", "resolve_separators"]

ORDER_BLOCK = 4096
SHARD_TOKENS = 1 << 24


class RowStream(Iterator[tuple[np.ndarray, list[int], list[int]]]):
    """Rows of a store in order, each as (ids (T + 1,), segment starts, segment documents); resumable at every row.

    Args:
        store: The tokenised documents.
        settings: How to pack.
        separators: `resolve_separators` of the same settings.
        state: What `state_dict()` gave after some row; the stream goes on with the next one.

    Attributes:
        tail_tokens: After the end, the tokens that did not fill a row and were dropped.
        padding: Tokens of padding in the last row.
    """

    def __init__(
        self, store: TokenStore, settings: PackSettings, separators: Separators, state: dict[str, int] | None = None
    ) -> None:
        self.store, self.settings, self.separators = store, settings, separators
        self.none = np.iinfo(store.dtype).max
        self.tail_tokens = self.padding = 0
        self._block: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        self._counts = {"dropped_documents": 0, "dropped_tokens": 0, "dropped_separators": 0}
        self._last = self._last_kept()
        self._position, self._offset = 0, 0
        if state is not None:
            self._position, self._offset = state["position"], state["offset"]
            self._counts = {key: state.get(key, 0) for key in self._counts}  # earlier versions dropped no separators
            self._piece = self._make_piece() if self._position < len(store) else None
        else:
            self._position = -1
            self._next_piece()

    def state_dict(self) -> dict[str, int]:
        """Where the next row starts: place in the order, token within that document, and what was dropped so far."""
        return {"position": self._position, "offset": self._offset, **self._counts}

    def __next__(self) -> tuple[np.ndarray, list[int], list[int]]:
        length = self.settings.length
        ids = np.full(length + 1, self.none, dtype=self.store.dtype)
        starts: list[int] = []
        documents: list[int] = []
        filled = 0
        while filled < length and self._piece is not None:
            taken = self._piece[self._offset : self._offset + length - filled]
            ids[filled : filled + taken.size] = taken
            starts.append(filled)
            documents.append(self._document(self._position))
            filled += taken.size
            self._offset += taken.size
            if self._offset == self._piece.size:
                self._next_piece()
        if filled < length:
            self.tail_tokens = filled
            if filled == 0 or self.settings.tail == "drop":
                raise StopIteration
            ids[filled:length] = self.separators.padding
            self.padding = length - filled
            self.tail_tokens = 0
            return ids, [*starts, filled], [*documents, PADDING]
        if self._piece is not None and not (self.settings.mask_documents and self._offset == 0):
            ids[length] = self._piece[self._offset]
        if self.settings.row_end == "drop" and self._offset:
            self._drop_rest()
        return ids, starts, documents

    def _drop_rest(self) -> None:
        """Leave out what the row's end cut off, and start the next row with the next document."""
        assert self._piece is not None
        document = self.store.length(self._document(self._position))
        packed = min(max(self._offset - len(self.separators.before), 0), document)
        self._counts["dropped_tokens"] += document - packed
        self._counts["dropped_separators"] += self._piece.size - self._offset - (document - packed)
        self._next_piece()

    def _next_piece(self) -> None:
        """Go to the next document that is kept; `_piece` is None after the last."""
        self._offset, self._piece = 0, None
        self._position += 1
        while self._position < len(self.store):
            if self._kept(self._position):
                self._piece = self._make_piece()
                return
            self._counts["dropped_documents"] += 1
            self._counts["dropped_tokens"] += self.store.length(self._document(self._position))
            self._position += 1

    def _make_piece(self) -> np.ndarray:
        separators, ids = self.separators, self.store[self._document(self._position)]
        after = separators.after if self._position == self._last else separators.after + separators.between
        return np.concatenate([np.array(separators.before, ids.dtype), ids, np.array(after, ids.dtype)])

    def _kept(self, position: int) -> bool:
        return (
            self.settings.long_documents == "split"
            or self.store.length(self._document(position)) <= self.settings.length
        )

    def _last_kept(self) -> int:
        return next((p for p in reversed(range(len(self.store))) if self._kept(p)), -1)

    def _document(self, position: int) -> int:
        if not self.settings.shuffle:
            return position
        block = position // ORDER_BLOCK
        if self._block[0] != block:
            places = np.arange(block * ORDER_BLOCK, min((block + 1) * ORDER_BLOCK, len(self.store)))
            self._block = (block, permuted(places, len(self.store), self.settings.seed))
        return int(self._block[1][position % ORDER_BLOCK])


def pack(
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    settings: PackSettings,
    *,
    rows_per_shard: int | None = None,
    quiet: bool = False,
) -> PackedRows:
    """Pack a token store into rows on disk; resume where an earlier call was interrupted.

    Args:
        store: The tokenised documents.
        tokenizer: The tokenizer they were made with: it encodes the separator.
        out: Folder of the rows.
        settings: How to pack.
        rows_per_shard: Rows in a shard; by default as many as make about 16.8 million tokens, and at least one.
        quiet: True shows no progress bar.

    Returns:
        The finished rows. Every token of every document is in exactly one place, or counted in the manifest as dropped
        (`dropped_tokens` of long documents and of rows' ends, `tail_dropped_tokens` of the last row).

    Raises:
        ValueError: The tokenizer is not the store's, `out` was made from something else or is being written by someone
            else, or the store has fewer tokens than one row and the tail is dropped.
    """
    store.check_tokenizer(tokenizer)
    separators = resolve_separators(settings, tokenizer)
    rows_per_shard = rows_per_shard or max(1, SHARD_TOKENS // settings.length)
    positions = settings.positions
    if positions == "auto":
        positions = "document" if settings.mask_documents else "row"
    asked = asdict(settings)
    if settings.row_end == "continue":
        del asked["row_end"]  # as earlier versions wrote it, whose folders are resumed
    resolved = {
        **asked,
        "format": FORMAT,
        "positions": positions,
        "separators": _as_lists(separators),
        "dtype": store.dtype.str,
        "rows_per_shard": rows_per_shard,
        "tokenizer": store.manifest["tokenizer"],
        "tokens_sha256": sha256(store.folder / "manifest.json"),
    }
    folder = ShardFolder(out, "rows", resolved)
    if folder.manifest() is None:
        with locked(folder.folder):
            folder.finish(_pack(store, settings, separators, folder, quiet))
    return PackedRows(out)


def _as_lists(separators: Separators) -> dict[str, Any]:
    """`Separators` as JSON holds it: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(separators).items()}


def _pack(
    store: TokenStore, settings: PackSettings, separators: Separators, folder: ShardFolder, quiet: bool
) -> dict[str, Any]:
    """Write the shards that are missing; return the manifest."""
    records = folder.resume()
    stream = RowStream(store, settings, separators, records[-1]["state"] if records else None)
    done = sum(record["rows"] for record in records)
    estimate = store.tokens + len(store) * (len(separators.before) + len(separators.between) + len(separators.after))
    with (
        RowWriter(folder, settings.length, store.dtype, folder.settings["rows_per_shard"], len(records)) as writer,
        progress(
            desc="pack", unit="tok", unit_scale=True, quiet=quiet, total=estimate, initial=done * settings.length
        ) as bar,
    ):
        for ids, starts, documents in stream:
            writer.append(ids, starts, documents)
            # Taken after every row: a dropped tail comes after the last row's state and is met again on resume.
            state = stream.state_dict()
            bar.update(settings.length)
            if writer.full:
                records.append(writer.commit({"state": state, "padding": stream.padding}))
                store.release()
        if writer.rows:
            records.append(writer.commit({"state": state, "padding": stream.padding}))
    manifest = _manifest(store, stream, folder.settings, records)
    if not manifest["rows"]:
        raise ValueError(
            f"the {manifest['document_tokens']:,} tokens of {store.folder} do not fill one row of "
            f"{settings.length:,}. Use a shorter row, more text, or packing.tail=pad, which fills the last row up."
        )
    return manifest


def _manifest(
    store: TokenStore, stream: RowStream, resolved: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Settings and counts; the counts are checked to add up, since training budgets are computed from them."""
    state, separators = stream.state_dict(), stream.separators
    kept = len(store) - state["dropped_documents"]
    separator_tokens = kept * (len(separators.before) + len(separators.after)) + max(0, kept - 1) * len(
        separators.between
    )
    separator_tokens -= state["dropped_separators"]
    rows = sum(record["rows"] for record in records)
    counts = {
        "rows": rows,
        "documents": kept,
        "document_tokens": store.tokens - state["dropped_tokens"],
        "separator_tokens": separator_tokens,
        "padding_tokens": sum(record["padding"] for record in records),
        "tail_dropped_tokens": stream.tail_tokens,
        "dropped_documents": state["dropped_documents"],
        "dropped_tokens": state["dropped_tokens"],
    }
    produced = rows * resolved["length"] - counts["padding_tokens"] + counts["tail_dropped_tokens"]
    expected = counts["document_tokens"] + separator_tokens
    assert produced == expected, f"{produced} tokens packed of {expected}"
    return {**resolved, **counts, "sources": store.manifest["sources"], "shards": records}
