"""Documents to shards of token ids, in parallel, one whole shard at a time.

A store is a folder with, for every shard, `tokens-NNNNN.bin` (ids, little-endian, 2 or 4 bytes each),
`tokens-NNNNN.offsets.npy` (where each document starts; one more entry for the end), `tokens-NNNNN.documents.jsonl`
(id, source and licence of each) and its record; then `manifest.json`. No begin or end token is added: what goes between
documents is the packer's business. Memory is a few batches of text and one shard's offsets, whatever the corpus' size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ultralong.data.read.documents import Document, nothing_taken
from ultralong.data.tokens.encoding import Encoder, make_encoder, token_dtype, tokenizer_fingerprint, vocabulary_of
from ultralong.data.tokens.shards import ShardFolder
from ultralong.data.tokens.store import FORMAT, TokenStore
from ultralong.utils.files import locked
from ultralong.utils.processes import WorkerPool, result_of
from ultralong.utils.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_encode: Encoder | None = None  # one per worker process


def tokenize_corpus(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    *,
    shard_tokens: int = 1 << 24,
    batch_characters: int = 1 << 20,
    workers: int = 1,
    provenance: dict[str, Any] | None = None,
    upgrade_provenance: Callable[[Any], Any] | None = None,
    quiet: bool = False,
) -> TokenStore:
    """Tokenise `documents` in order into a store; resume where an earlier call was interrupted.

    Args:
        documents: Any iterable that yields the same documents in the same order each time. Documents that give no
            token are counted and left out.
        tokenizer: A transformers tokenizer; a fast one runs a batch on all cores by itself.
        out: The store's folder.
        shard_tokens: A shard ends with the document that reaches this many tokens.
        batch_characters: Characters encoded in one call; a longer document is a batch of its own.
        workers: 1 leaves parallelism to the tokenizer's threads; more starts that many processes, which suits machines
            with dozens of cores and tokenizers written in Python. The bytes are the same.
        provenance: Plain JSON values that decide which documents come (a recipe, say); kept, and compared later. With
            it, a finished store is returned without reading the documents again; without, they are read and compared.
        upgrade_provenance: Brings a provenance that an earlier version kept into the form of today.
        quiet: True shows no progress bar.

    Returns:
        The finished store.

    Raises:
        ValueError: `out` was made with other settings or another tokenizer, is being written by someone else, or the
            documents differ from those already tokenised there.
    """
    if min(shard_tokens, batch_characters, workers) < 1:
        raise ValueError(
            f"shard_tokens, batch_characters and workers must be at least 1, found {shard_tokens}, "
            f"{batch_characters} and {workers}."
        )
    dtype = token_dtype(vocabulary_of(tokenizer))
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": dtype.str,
        "shard_tokens": shard_tokens,
        "provenance": provenance,
    }
    folder = ShardFolder(out, "tokens", settings, upgrade_provenance)
    manifest = folder.manifest()
    if manifest is not None and provenance is not None:
        return TokenStore(out)
    with locked(folder.folder):
        records = folder.resume()
        stream = iter(documents)
        _pass_over(stream, records, folder.folder)
        if manifest is None:
            with progress(
                desc="tokenise",
                unit="tok",
                unit_scale=True,
                quiet=quiet,
                initial=sum(record["tokens"] for record in records),
            ) as bar:
                records.extend(_write(stream, tokenizer, folder, len(records), batch_characters, workers, bar))
            folder.finish(manifest_totals(settings, records))
        elif next(stream, None) is not None:
            raise ValueError(f"{out} is finished, and there are more documents now than then. Choose another folder.")
    return TokenStore(out)


def _write(
    stream: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: ShardFolder,
    number: int,
    batch_characters: int,
    workers: int,
    bar: Any,
) -> Iterator[dict[str, Any]]:
    """Encode the rest of the stream; yield the record of each shard as it becomes whole."""
    shard = _ShardWriter(folder, number)
    try:
        with _pool(tokenizer, workers) as (submit, depth):
            for batch, encoded in _encoded(batched(stream, batch_characters), submit, depth):
                for document, ids in zip(batch, encoded, strict=True):
                    shard.add(document, ids)
                    if shard.tokens >= folder.settings["shard_tokens"]:
                        yield shard.commit()
                        shard = _ShardWriter(folder, shard.number + 1)
                bar.update(sum(ids.size for ids in encoded))
        if shard.seen:
            yield shard.commit()
    finally:
        shard.close()


class _ShardWriter:
    """The shard being written."""

    def __init__(self, folder: ShardFolder, number: int) -> None:
        self.folder, self.number = folder, number
        self.seen = self.tokens = self.empty = 0
        self.offsets = [0]
        self.sources: dict[str, dict[str, Any]] = {}
        self.digest = hashlib.sha256()
        self.streams: dict[str, BinaryIO] = {}

    def add(self, document: Document, ids: np.ndarray) -> None:
        self._open()
        self.seen += 1
        _digest(self.digest, document)
        if ids.size == 0:
            self.empty += 1
            return
        self.streams["bin"].write(ids.data)
        self.streams["documents.jsonl"].write(
            json.dumps({"id": document.id, "source": document.source, "license": document.license}).encode() + b"\n"
        )
        self.tokens += ids.size
        self.offsets.append(self.tokens)
        row = self.sources.setdefault(document.source, nothing_taken())
        row["documents"] += 1
        row["tokens"] += ids.size
        row["characters"] += len(document.text)
        row["licenses"][document.license] = row["licenses"].get(document.license, 0) + ids.size

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def _open(self) -> None:
        for ending in () if self.streams else ("bin", "documents.jsonl"):
            self.streams[ending] = open(self.folder.partial(self.number, ending), "wb")  # noqa: SIM115 - see close

    def commit(self) -> dict[str, Any]:
        self.close()
        with open(self.folder.partial(self.number, "offsets.npy"), "wb") as stream:
            np.save(stream, np.array(self.offsets, dtype="<i8"))
        endings = (*self.streams, "offsets.npy")
        partials = {ending: self.folder.partial(self.number, ending) for ending in endings}
        return self.folder.commit(
            self.number,
            partials,
            {
                "documents": len(self.offsets) - 1,
                "tokens": self.tokens,
                "seen": self.seen,
                "empty": self.empty,
                "input_sha256": self.digest.hexdigest(),
                "sources": dict(sorted(self.sources.items())),
            },
        )


def _digest(digest: Any, document: Document) -> None:
    """Add a document to a running hash of the input, lengths first so that no two inputs look alike."""
    for part in (document.id.encode(), document.text.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _pass_over(stream: Iterator[Document], records: list[dict[str, Any]], folder: Path) -> None:
    """Read past the documents that the whole shards hold, and make sure that they are still the same ones."""
    for record in records:
        digest = hashlib.sha256()
        for _ in range(record["seen"]):
            document = next(stream, None)
            if document is None:
                break
            _digest(digest, document)
        if digest.hexdigest() != record["input_sha256"]:
            raise ValueError(
                f"the documents that {record['shard']} in {folder} was made from have changed since. "
                "Delete the folder, or choose another, and tokenise again."
            )


def batched(stream: Iterator[Document], characters: int) -> Iterator[list[Document]]:
    """Group documents into lists of about `characters` characters, never splitting one."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        if batch and size + len(document.text) > characters:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


@contextmanager
def _pool(tokenizer: PreTrainedTokenizerBase, workers: int) -> Iterator[tuple[Callable[[list[str]], Future], int]]:
    """How to have a batch encoded, and how many batches to keep under way: reading and writing go on beside it."""
    if workers == 1:
        # Two threads, so that the tokenizer's own threads have the next batch while this one becomes an array.
        executor: Executor = ThreadPoolExecutor(2)
        encode = make_encoder(tokenizer)
    else:
        executor = WorkerPool(workers, _start_worker, tokenizer)
        encode = _encode_in_worker
    try:
        yield lambda texts: executor.submit(encode, texts), 2 * workers
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _encode
    _encode = make_encoder(tokenizer)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _encode is not None
    return _encode(texts)


def _encoded(
    batches: Iterator[list[Document]], submit: Callable[[list[str]], Future], depth: int
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Encode batches, `depth` at a time, and give them back in order."""
    pending: deque[tuple[list[Document], list[int], Future]] = deque()

    def oldest() -> tuple[list[Document], list[np.ndarray]]:
        documents, places, future = pending.popleft()
        encoded = result_of(future)
        return documents, [encoded[place] for place in places]

    for batch in batches:
        # Copies of an up-sampled document share one text and follow each other: encode it once.
        unique = {id(document.text): document.text for document in batch}
        place = {key: number for number, key in enumerate(unique)}
        pending.append((batch, [place[id(document.text)] for document in batch], submit(list(unique.values()))))
        if len(pending) > depth:
            yield oldest()
    while pending:
        yield oldest()


def manifest_totals(settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the shards, per source and licence, and what the shards are."""
    sources: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, row in record["sources"].items():
            total = sources.setdefault(name, nothing_taken())
            for key in ("documents", "tokens", "characters"):
                total[key] += row[key]
            for license, tokens in row["licenses"].items():
                total["licenses"][license] = total["licenses"].get(license, 0) + tokens
    return {
        **settings,
        "documents": sum(record["documents"] for record in records),
        "tokens": sum(record["tokens"] for record in records),
        "empty": sum(record["empty"] for record in records),
        "sources": dict(sorted(sources.items())),
        "shards": records,
    }
