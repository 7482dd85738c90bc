"""Several token stores, made side by side on many machines, as one: its shards are theirs, under one manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralong.data.tokens.shards import ShardFolder
from ultralong.data.tokens.store import FORMAT, TokenStore
from ultralong.data.tokens.tokenize import manifest_totals
from ultralong.utils.files import locked, read_json, sha256, write_json


def merge_stores(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> TokenStore:
    """Make one store of several, in the given order; nothing is tokenised again and documents keep their order.

    Files are linked where the file system can, and copied otherwise.

    Args:
        folders: Finished stores, made with one tokenizer.
        out: Folder of the new store.

    Returns:
        The new store. Its documents, tokens and counts by source and licence are the sums of theirs.

    Raises:
        ValueError: A store is unfinished or made with another tokenizer, a document is in two of them, or `out` was
            made from others.
    """
    if not folders:
        raise ValueError("there is no token store to merge.")
    stores = [TokenStore(folder) for folder in folders]
    first = stores[0].manifest
    for store in stores:
        if store.manifest["tokenizer"]["sha256"] != first["tokenizer"]["sha256"]:
            raise ValueError(f"{store.folder} was made with another tokenizer than {stores[0].folder}.")
    settings = {
        "format": FORMAT,
        "tokenizer": first["tokenizer"],
        "dtype": first["dtype"],
        "shard_tokens": first["shard_tokens"],
        "provenance": {"merged": [sha256(store.folder / "manifest.json") for store in stores]},
    }
    folder = ShardFolder(out, "tokens", settings)
    if folder.manifest() is None:
        with locked(folder.folder):
            records = folder.resume()
            theirs = [(store, shard) for store in stores for shard in store.manifest["shards"]]
            _check_ids(theirs)
            for number, (store, shard) in enumerate(theirs[len(records) :], start=len(records)):
                records.append(_take(folder, number, store, shard))
            folder.finish(manifest_totals(settings, records))
    notes = add_notes([store.folder / "sources.json" for store in stores])
    if notes:
        write_json(folder.folder / "sources.json", notes)
    return TokenStore(out)


def _take(folder: ShardFolder, number: int, store: TokenStore, shard: dict[str, Any]) -> dict[str, Any]:
    """Link or copy the files of a shard under their new names, and write its record."""
    partials = {}
    for name in shard["files"]:
        ending = name.removeprefix(f"{shard['shard']}.")
        partials[ending] = folder.partial(number, ending)
        try:
            os.link(store.folder / name, partials[ending])
        except OSError:  # another file system, or one without links
            shutil.copyfile(store.folder / name, partials[ending])
    kept = {key: value for key, value in shard.items() if key not in ("shard", "files")}
    record = folder.commit(number, partials, kept)
    expected = sorted(file["sha256"] for file in shard["files"].values())
    if sorted(file["sha256"] for file in record["files"].values()) != expected:
        raise ValueError(f"{shard['shard']} in {store.folder} differs from its manifest. Make that store again.")
    return record


def _check_ids(shards: list[tuple[TokenStore, dict[str, Any]]]) -> None:
    """A document that two machines read would be trained on twice."""
    seen: dict[bytes, str] = {}
    for store, shard in shards:
        lines = (store.folder / f"{shard['shard']}.documents.jsonl").read_bytes().split(b"\n")[:-1]
        for line in lines:
            if line in seen and seen[line] != str(store.folder):
                raise ValueError(f"{line.decode()} is in {store.folder} and in {seen[line]}. Merge each part once.")
            seen[line] = str(store.folder)


def add_notes(paths: list[Path]) -> dict[str, Any]:
    """What the stores' reports say of lengths and skips, added up by source."""
    total: dict[str, Any] = {}
    for notes in (read_json(path) for path in paths if path.exists()):
        for name, row in notes.items():
            total[name] = add_numbers(total[name], row) if name in total else row
    return total


def add_numbers(a: Any, b: Any, key: str = "") -> Any:
    """Two reports added up: numbers add up, lists of numbers too, groups key by key; what describes stays."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {
            name: add_numbers(a[name], b[name], name) if name in a and name in b else a.get(name, b.get(name))
            for name in {**a, **b}
        }
    if key in ("edges", "characters_per_token"):
        return a
    if isinstance(a, list) and isinstance(b, list):
        same = len(a) == len(b) and all(isinstance(n, int) for n in a + b)
        return [x + y for x, y in zip(a, b, strict=True)] if same else a
    both = isinstance(a, int | float) and isinstance(b, int | float)
    return a + b if both and not isinstance(a, bool) else a
