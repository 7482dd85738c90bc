"""Conversations packed whole into rows, several to a row, in the format of `ultralong.data.rows.packed_rows`.

Each example is its own document under the mask, with positions that start again: short examples do not see each other,
whatever the length of the window they are trained in. How one conversation becomes tokens is in `chat_template`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ultralong.data.chat.examples import Example, encode_conversations
from ultralong.data.chat.subsample import Subsample
from ultralong.data.chat.template import encode_chat
from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import ReadReport
from ultralong.data.read.messages import Message
from ultralong.data.rows.packed_rows import FORMAT, PADDING, PackedRows, RowWriter
from ultralong.data.rows.permutation import permuted
from ultralong.data.tokens.encoding import token_dtype, tokenizer_fingerprint, vocabulary_of
from ultralong.data.tokens.shards import ShardFolder
from ultralong.utils.chat_template import DATE, uses_clock
from ultralong.utils.files import locked
from ultralong.utils.units import check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatSettings", "Message", "encode_chat", "pack_chat"]


@dataclass(frozen=True)
class ChatSettings:
    """How conversations become rows.

    Attributes:
        length: Tokens per row, T.
        max_tokens: A longer example is left out and counted; None means T. The recipe uses 8,192.
        buffer_rows: Examples are fitted into rows a window of about this many rows' tokens at a time.
        shuffle: True takes the examples of a window's worth in a pseudo-random order.
        seed: Names that order; 0 or more and below 2**32.
        each_answer: True makes an example of every answer, with the turns before it, as the model will see them. A
            chat template that rewrites earlier turns needs it: Qwen 3's writes an empty thought into the last answer
            alone. Turns before the last answer are then read, and counted, once for each answer.
    """

    RENAMED: ClassVar[dict[str, str]] = {"window_rows": "buffer_rows"}

    length: int
    max_tokens: int | None = None
    buffer_rows: int = 64
    shuffle: bool = True
    seed: int = 0
    each_answer: bool = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.buffer_rows < 1:
            raise ValueError(f"length must be at least 2 and buffer_rows 1: {self.length}, {self.buffer_rows}.")
        check_seed(self.seed)
        if self.max_tokens is not None and not 2 <= self.max_tokens <= self.length:
            raise ValueError(f"max_tokens must lie in 2..{self.length} (the row), found {self.max_tokens}.")


def pack_chat(
    conversations: Iterable[Conversation | list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    settings: ChatSettings,
    *,
    provenance: dict[str, Any] | None = None,
    upgrade_provenance: Callable[[Any], Any] | None = None,
    report: ReadReport | None = None,
    subsample: Subsample | None = None,
    rows_per_shard: int | None = None,
    quiet: bool = False,
) -> PackedRows:
    """Encode conversations and pack them whole into rows, several to a row, each under its own mask.

    Malformed conversations and those over the limit are left out and counted by reason. All examples' tokens are held
    in memory (5 bytes each: 0.5 GB for 100,000 examples of 1,000 tokens), so that they can be shuffled as a whole; with
    `subsample` those that may still be taken, and the rest is not even encoded.

    Args:
        conversations: `Conversation`s, or plain lists of `{"role", "content"}`.
        tokenizer: Has the chat template.
        out: Folder of the rows.
        settings: Row length, limit, order.
        provenance: Plain JSON values that decide which conversations come; kept. With it, a finished folder is returned
            without reading the conversations again; without, they are read and compared.
        upgrade_provenance: Brings a provenance that an earlier version kept into the form of today.
        report: Counts go here too, when the caller has a report of its own.
        subsample: How many are taken, by category; None takes all. `settings.seed` decides which.
        rows_per_shard: Rows in a shard; by default as many as make about 16.8 million tokens, and at least one.
        quiet: True shows no progress bar.

    Returns:
        Rows with `mask_documents` on and positions that start again at each example; `document_ids` are places in
        `conversations`.

    Raises:
        ValueError: The tokenizer has no usable template, no example is left, or `out` was made from something else.
    """
    report = report if report is not None else ReadReport()
    limit = settings.max_tokens or settings.length
    resolved = {
        "format": FORMAT,
        **{key: value for key, value in vars(settings).items() if key not in ("max_tokens", "each_answer")},
        **({"each_answer": True} if settings.each_answer else {}),  # without it, rows are those of earlier versions
        "max_tokens": limit,
        "mask_documents": True,
        "positions": "document",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "dtype": token_dtype(vocabulary_of(tokenizer)).str,
        "provenance": provenance,
        **({"date": DATE} if tokenizer.chat_template and uses_clock(tokenizer.get_chat_template()) else {}),
        "subsample": None if subsample is None else asdict(subsample),
        "rows_per_shard": rows_per_shard or max(1, (1 << 24) // settings.length),
    }
    if provenance is not None:
        finished = ShardFolder(out, "rows", resolved, upgrade_provenance)
        if finished.manifest(ignore=("input_sha256",)) is not None:
            return PackedRows(out)
    encoded = encode_conversations(
        conversations, tokenizer, limit, report, settings.seed, subsample, quiet, settings.each_answer
    )
    folder = ShardFolder(out, "rows", {**resolved, "input_sha256": encoded.sha256}, upgrade_provenance)
    if folder.manifest() is None:
        with locked(folder.folder):
            counts = {"sources": encoded.sources, "subsampled": encoded.subsampled}
            folder.finish({**_write_rows(encoded.examples, settings, folder, report), **counts})
    return PackedRows(out)


def _write_rows(
    examples: list[Example], settings: ChatSettings, folder: ShardFolder, report: ReadReport
) -> dict[str, Any]:
    """Write the rows that are missing; return the manifest."""
    records = folder.resume()
    done = sum(record["rows"] for record in records)
    dtype = np.dtype(folder.settings["dtype"])
    tokens = targets = rows = 0
    with RowWriter(
        folder, settings.length, dtype, folder.settings["rows_per_shard"], len(records), targets=True
    ) as writer:
        for rows, row in enumerate(_fit(examples, settings), start=1):
            ids, starts, documents, bits = _lay_out(row, settings.length, dtype)
            tokens += sum(example.ids.size for example in row)
            targets += int(bits.sum())
            if rows > done:
                writer.append(ids, starts, documents, bits)
                if writer.full:
                    records.append(writer.commit({}))
        if writer.rows:
            records.append(writer.commit({}))
    return {
        **folder.settings,
        "rows": rows,
        "documents": len(examples),
        "document_tokens": tokens,
        "separator_tokens": 0,
        "target_tokens": targets,
        "padding_tokens": rows * settings.length - tokens,
        "tail_dropped_tokens": 0,
        "skipped": report.as_json()["skipped"],
        "unused_fields": dict(sorted(report.unused.items())),
        "shards": records,
    }


def _fit(examples: list[Example], settings: ChatSettings) -> Iterator[list[Example]]:
    """Put examples into rows, first fit with the longest first, a window at a time so that rows stay mixed."""
    order = np.arange(len(examples))
    if settings.shuffle:
        order = permuted(order, len(examples), settings.seed)
    window: list[Example] = []
    size = 0
    left: list[Example] = []
    for place in order:
        window.append(examples[place])
        size += examples[place].ids.size
        if size >= settings.buffer_rows * settings.length:
            # The last row of a window is the emptiest; what is in it gets another chance in the next.
            *full, left = _first_fit(left + window, settings.length)
            yield from full
            window, size = [], 0
    yield from _first_fit(left + window, settings.length)


def _first_fit(examples: list[Example], length: int) -> list[list[Example]]:
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -example.ids.size):
        fits = next((row for row, free in enumerate(room) if free >= example.ids.size), None)
        if fits is None:
            rows.append([])
            room.append(length)
            fits = len(rows) - 1
        rows[fits].append(example)
        room[fits] -= example.ids.size
    return rows


def _lay_out(row: list[Example], length: int, dtype: np.dtype) -> tuple[np.ndarray, list[int], list[int], np.ndarray]:
    """A row's ids (T + 1,), segment starts, documents, and (T,) bits that say which inputs have a target."""
    ids = np.full(length + 1, np.iinfo(dtype).max, dtype=dtype)
    bits = np.zeros(length, dtype=bool)
    starts, documents, filled = [], [], 0
    for example in row:
        size = example.ids.size
        ids[filled : filled + size] = example.ids
        bits[filled : filled + size - 1] = example.mask[1:]
        starts.append(filled)
        documents.append(example.number)
        filled += size
    if filled < length:
        ids[filled:length] = 0
        starts.append(filled)
        documents.append(PADDING)
    return ids, starts, documents, bits
