"""From a recipe to packed rows in one call: fetch, read, clean, sample, tokenise, pack; resumable, with a report.

The folder holds the rows themselves (`PackedRows(folder)`), the token store in `tokens/`, `recipe.yaml` as it was
resolved, `report.json`, `left_out.jsonl`, which names everything that was left out, with the reason, and, when test
sets are kept out, `contaminated.jsonl`, which names the texts that overlap with one and the words they share.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.chat.subsample import summary
from ultralong.data.read.documents import ReadReport, SkipLog, nothing_taken
from ultralong.data.recipe.schema import Recipe, Source, load_recipe
from ultralong.data.recipe.sources import SourceReader, why_nothing
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.packing import PackSettings, pack, resolve_separators
from ultralong.data.select.decontaminate import OverlapLog, read_tests
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.utils.files import drop_partials, read_json, write_json
from ultralong.utils.progress import Stopwatch
from ultralong.utils.settings import from_mapping, save, to_mapping
from ultralong.utils.units import many

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackReport:
    """What went into the rows and what came of it; `to_dict()` is JSON.

    Attributes:
        recipe: The recipe's name.
        folder: Where the rows are.
        length: Tokens per row.
        rows: How many rows.
        tokens: Tokens in the rows, separators included, padding not.
        counts: The rows' counts: documents, separators, padding, what was dropped.
        skipped: Conversations left out, by reason (kind chat).
        unused_fields: In how many records a field was that was not used, by its name (kind chat).
        subsampled: For every category: conversations seen, wanted, taken (kind chat, with sub-sampling).
        sources: For every source: licence, documents, tokens, characters, what was fetched, what was skipped and why,
            and lengths before and after sampling.
        seconds: Wall time of the stages fetch, tokenise and pack in this call; little for what was there already.
        cpu_seconds: User and system time of this process in each, over all its threads.
        bytes: Size on disk of the tokens and of the rows.
        tokenizer: Its identity.
    """

    recipe: str
    folder: str
    length: int
    rows: int
    tokens: int
    counts: dict[str, int]
    skipped: dict[str, int]
    unused_fields: dict[str, int]
    subsampled: dict[str, dict[str, int]] | None
    sources: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    bytes: dict[str, int]
    tokenizer: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{many(self.rows, 'row')} of {self.length:,} tokens ({self.tokens:,} tokens) in {self.folder}"]
        for name, source in self.sources.items():
            if "read" in source:
                skipped = ", ".join(f"{count:,} {reason}" for reason, count in source["read"]["skipped"].items())
                lines.append(
                    f"  {name}: {many(source['documents'], 'document')}, {many(source['tokens'], 'token')}"
                    + (f"; left out: {skipped} (see left_out.jsonl)" if skipped else "")
                )
        if self.subsampled:
            lines.append(f"  taken: {summary(self.subsampled)}")
        if self.skipped:
            lines.append("  skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items()))
        if self.unused_fields:
            counted = ", ".join(f"{name} ({count:,})" for name, count in self.unused_fields.items())
            lines.append(f"  fields of records that were not used: {counted}")
        return "\n".join(lines)


def pack_recipe(
    recipe: Recipe | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
    length: int,
    out: str | os.PathLike[str],
    *,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    workers: int = 1,
    quiet: bool = False,
) -> PackReport:
    """Make packed rows from a recipe, going on where an earlier call was interrupted.

    Args:
        recipe: A recipe, its YAML file, or a folder of texts.
        tokenizer: A tokenizer, or the folder of one (a checkpoint will do).
        length: Tokens per row.
        out: Folder of the rows; `tokens/` inside it holds the token store.
        limit: Take about this many tokens of each source at most: a quick look at a large recipe.
        cache: Where fetched packages are kept; `~/.cache/ultralong/sources` when None.
        workers: As for `tokenize_corpus`.
        quiet: True shows no progress bars.

    Returns:
        The report, also written to `out/report.json`.

    Raises:
        ValueError: The recipe is wrong, a source cannot be had or read, or `out` was made from something else.
    """
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).with_token_limit(limit)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    settings = recipe.row_settings(length)
    if isinstance(settings, PackSettings):
        # What the tokenizer lacks is better said before an hour's work than after.
        resolve_separators(settings, tokenizer)
    watch, out = Stopwatch(), Path(out)
    names, hits = SkipLog(out / "left_out.jsonl"), OverlapLog(out / "contaminated.jsonl")
    tests = None if recipe.decontaminate is None else read_tests(recipe.decontaminate, cache, quiet)
    shared = ReadReport(every=names)  # of conversations, whose defects may show only when they are encoded
    with watch.stage("fetch"):
        opened = [
            SourceReader(
                source, recipe, cache, quiet, shared if recipe.kind == "chat" else ReadReport(every=names), tests, hits
            )
            for source in recipe.sources
        ]
    with closing(names), closing(hits):
        if isinstance(settings, PackSettings):
            rows, sources = _pack_documents(recipe, opened, tokenizer, settings, out, workers, quiet, watch)
        else:
            rows, sources = _pack_chat(recipe, opened, tokenizer, settings, out, quiet, watch)
    save(recipe, out / "recipe.yaml", "The recipe these rows were made from, every setting written out.")
    result = make_report(recipe, rows, sources, watch)
    write_json(out / "report.json", result.to_dict())
    return result


def _pack_documents(
    recipe: Recipe,
    opened: list[SourceReader],
    tokenizer: PreTrainedTokenizerBase,
    settings: PackSettings,
    out: Path,
    workers: int,
    quiet: bool,
    watch: Stopwatch,
) -> tuple[PackedRows, dict[str, dict[str, Any]]]:
    documents = (document for source in opened for document in source.documents(tokenizer))
    with watch.stage("tokenise"):
        store = tokenize_corpus(
            documents,
            tokenizer,
            out / "tokens",
            workers=workers,
            provenance=_provenance(recipe, opened),
            upgrade_provenance=_upgraded,
            quiet=quiet,
        )
        notes = store.folder / "sources.json"
        if not notes.exists():
            # Nothing is left to read, but where the run was cut between the store's end and its notes.
            drop_partials(notes)
            deque(documents, maxlen=0)
            write_json(notes, {name: noted for source in opened for name, noted in source.notes().items()})
    if not store.tokens:
        told = "; ".join(f"{name}: {why_nothing(noted)}" for name, noted in read_json(notes).items())
        raise ValueError(f"nothing was read. {told}")
    with watch.stage("pack"):
        rows = pack(store, tokenizer, out, settings, quiet=quiet)
    taken, noted = store.manifest["sources"], read_json(notes)
    return rows, {name: {**nothing_taken(), **taken.get(name, {}), **noted[name]} for name in noted}


def _pack_chat(
    recipe: Recipe,
    opened: list[SourceReader],
    tokenizer: PreTrainedTokenizerBase,
    settings: ChatSettings,
    out: Path,
    quiet: bool,
    watch: Stopwatch,
) -> tuple[PackedRows, dict[str, dict[str, Any]]]:
    talks = (talk for source in opened for talk in source.conversations(tokenizer))
    report, provenance = opened[0].report, _provenance(recipe, opened)
    with watch.stage("pack"):
        rows = pack_chat(
            talks,
            tokenizer,
            out,
            settings,
            provenance=provenance,
            upgrade_provenance=_upgraded,
            report=report,
            subsample=recipe.subsample,
            quiet=quiet,
        )
        notes = out / "sources.json"
        if not notes.exists():
            drop_partials(notes)
            deque(talks, maxlen=0)  # as for documents
            write_json(notes, {o.source.name: {"fetched": o.fetched, **o.overlap()} for o in opened})
    taken, noted = rows.manifest["sources"], read_json(notes)
    return rows, {
        o.source.name: {
            "license": o.source.license,
            "category": o.source.category,
            **taken.get(o.source.name, {}),
            **noted[o.source.name],
        }
        for o in opened
    }


def _provenance(recipe: Recipe, opened: list[SourceReader]) -> dict[str, Any]:
    """Everything that decides which documents come: the recipe without its packing, and what the sources hold."""
    return {"recipe": _decides(recipe), "sources": {source.source.name: source.provenance() for source in opened}}


def _upgraded(provenance: Any) -> Any:
    """A provenance as an earlier version wrote it, with the keys and defaults of today."""
    try:
        recipe = from_mapping(Recipe, {"description": "", **_keys_of_today(provenance["recipe"])})
    except (ValueError, TypeError, KeyError):
        return provenance  # no recipe of ours: it is compared as it is
    return {**provenance, "recipe": _decides(recipe)}


def _keys_of_today(value: Any) -> Any:
    """The same values with renamed keys; without the notes that a user's file gets, as nobody wrote this one."""
    if isinstance(value, list):
        return [_keys_of_today(item) for item in value]
    if not isinstance(value, dict):
        return value
    names = {**Recipe.RENAMED, **Source.RENAMED}
    # Names of subsets and categories are the user's, whatever they are.
    return {names.get(key, key): item if key == "shares" else _keys_of_today(item) for key, item in value.items()}


def _decides(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in to_mapping(recipe).items() if key not in ("packing", "description")}


def make_report(recipe: Recipe, rows: PackedRows, sources: dict[str, dict[str, Any]], watch: Stopwatch) -> PackReport:
    """The report of finished rows, from their manifest, what is noted of each source, and the time it took."""
    manifest = rows.manifest
    keys = (
        "documents",
        "document_tokens",
        "separator_tokens",
        "target_tokens",
        "padding_tokens",
        "tail_dropped_tokens",
        "dropped_documents",
        "dropped_tokens",
    )
    sizes = {"rows": _size(rows.folder, "rows-*"), "tokens": _size(rows.folder / "tokens", "tokens-*")}
    counts = {key: manifest[key] for key in keys if key in manifest}
    return PackReport(
        recipe=recipe.name,
        folder=str(rows.folder),
        length=rows.length,
        rows=len(rows),
        tokens=len(rows) * rows.length - manifest["padding_tokens"],
        counts=counts,
        skipped=manifest.get("skipped", {}),
        unused_fields=manifest.get("unused_fields", {}),
        subsampled=manifest.get("subsampled"),
        sources=sources,
        seconds=watch.seconds,
        cpu_seconds=watch.cpu_seconds,
        bytes=sizes,
        tokenizer=manifest["tokenizer"],
    )


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
