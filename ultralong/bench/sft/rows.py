"""Rows for `ultralong.bench.sft.measure`: made on a machine with a package registry, used on one with a GPU.

A folder of them holds: `documents/` (rows of the new length for continued pretraining), `heldout/` (rows of held-out
documents), `haystack.jsonl` (their texts, to hide needles in), `training/` and `answers/` (packed conversations, and
held-out ones), and `rows.json` with their sources and licences. Nothing else is needed there.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ultralong.data.chat.holdout import SHORTEST, WORDS, hold_out
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import ReadReport
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import find_recipe, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.recipe.texts import read_documents
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.demo import Demo, DemoConfig
from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.rope import window_of
from ultralong.utils.files import read_json, read_jsonl, write_json, write_text

MOST_TOKENS = 8192  # of an example, as in the recipe
HAYSTACK_WINDOWS = 4  # windows' worth of tokens that needles are hidden in
CHARACTERS = 6  # more than a token has on average


def prepare_rows(
    config: DemoConfig,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    heldout: int,
    limit: int | None,
) -> dict[str, Any]:
    """Make the rows.

    Args:
        config: Recipes and windows.
        base: Folder of the model to be extended; only its tokenizer and config are read.
        out: Folder to write; finished parts of it are used as they are.
        heldout: Conversations kept apart.
        limit: About this many tokens of each source of documents at most; None takes all.

    Returns:
        The content of `rows.json`.

    Raises:
        ValueError: A recipe cannot be had, is not of conversations, or has too few of them.
    """
    out, tokenizer = Path(out), AutoTokenizer.from_pretrained(base)
    window = window_of(read_json(Path(base) / "config.json"))
    facts: dict[str, Any] = {"target": config.target, "seed": config.seed, "limit": limit}
    for name, recipe, most in (("documents", config.documents, limit), ("heldout", config.heldout, None)):
        made = pack_recipe(recipe, tokenizer, config.target, out / name, limit=most)
        shutil.rmtree(out / name / "tokens")  # twice the rows' size, and nothing reads it any more
        licenses = {source.name: source.license for source in load_recipe(recipe).sources}
        facts[name] = {"recipe": made.recipe, "rows": made.rows, "tokens": made.tokens, "licenses": licenses}
    _write_haystack(config, out / "haystack.jsonl")
    facts |= _conversations(config, tokenizer, window, out, heldout)
    write_json(out / "rows.json", facts)
    return facts


def _conversations(
    config: DemoConfig,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    out: Path,
    heldout: int,
) -> dict[str, Any]:
    """Pack the conversations to train on and those kept apart; returns what `rows.json` says of them."""
    recipe = load_recipe(config.conversations)
    if recipe.kind != "chat":
        raise ValueError(f"conversations: recipe {recipe.name} is of {recipe.kind}, one of kind chat is needed.")
    report = ReadReport()
    opened = [SourceReader(source, recipe, None, report=report) for source in recipe.sources]
    split = hold_out(itertools.chain.from_iterable(source.conversations() for source in opened), heldout, recipe.seed)
    settings = ChatSettings(length=window, max_tokens=min(MOST_TOKENS, window), seed=config.seed)
    facts: dict[str, Any] = {
        "licenses": {source.name: source.license for source in recipe.sources},
        "overlapping": split.overlapping,
        "rule": f"{WORDS} words in a row, or a whole turn of {SHORTEST} or more",
    }
    for name, talks in (("training", split.training), ("answers", split.heldout)):
        rows = pack_chat(talks, tokenizer, out / name, settings, report=report)
        keys = ("rows", "documents", "document_tokens", "target_tokens")
        facts[name] = {key: rows.manifest[key] for key in keys}
    return {"conversations": {"recipe": recipe.name, **facts, "skipped": report.as_json()["skipped"]}}


def _write_haystack(config: DemoConfig, path: Path) -> None:
    """Texts of held-out documents, a JSON line each, as many as a needle grid takes of them."""
    lines, left = [], CHARACTERS * HAYSTACK_WINDOWS * config.target
    for document in read_documents(find_recipe(config.heldout), quiet=True):
        lines.append(json.dumps({"text": document.text[:left]}) + "\n")
        left -= len(document.text)
        if left <= 0:
            break
    write_text(path, "".join(lines))


@dataclass
class PreparedDemo(Demo):
    """The demo's stages on rows made before: nothing is fetched, no source is read again.

    Attributes:
        start: Folder of the model to extend.
        prepared: Folder that `prepare_rows` wrote.
    """

    start: Path = Path("base")
    prepared: Path = Path("rows")

    def base(self) -> Path:
        """The model to extend."""
        return self.start

    def rows(self) -> PackedRows:
        """Rows of the new length for continued pretraining."""
        return PackedRows(self.prepared / "documents")

    def heldout(self) -> PackedRows:
        """Rows of documents kept apart."""
        return PackedRows(self.prepared / "heldout")

    def chat_rows(self) -> PackedRows:
        """Conversations to train on."""
        return PackedRows(self.prepared / "training")

    @cached_property
    def _haystack(self) -> Haystack:
        texts = [line["text"] for line in read_jsonl(self.prepared / "haystack.jsonl")]
        limit = HAYSTACK_WINDOWS * self.config.target
        return Haystack.from_texts(self.tokenizer(), texts, limit=limit, name="held-out documents")
