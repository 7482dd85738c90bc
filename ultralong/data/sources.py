"""A recipe's source, opened: its files on this machine, and the documents or conversations that come out of them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralong.data.clean import CLEANERS
from ultralong.data.conversations import Conversation, to_messages
from ultralong.data.decontaminate import Filter, HitList, read_tests
from ultralong.data.documents import Document, ReadReport, UniqueIds
from ultralong.data.fetch import describe, unpack
from ultralong.data.overlap import Grams
from ultralong.data.readers import Reader, list_files
from ultralong.data.recipe_schema import Recipe, Source
from ultralong.data.sampling import FU_CHARACTERS_PER_TOKEN, LengthCounts, sample, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_CHARACTERS = 1 << 18


class OpenSource:
    """One source of a recipe, its packages fetched and its files listed.

    Args:
        source: The source.
        recipe: The recipe it belongs to: length rule and seed.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.
        report: Where skips are counted; a new one when None.
        tests: The grams of the recipe's test sets, when they were read already.
        hits: Where texts that overlap with a test are listed.

    Attributes:
        fetched: What was fetched: registry, name, file, bytes and hash of each package.
        report: What was read and what was skipped.
        counts: Lengths before and after sampling.
        characters_per_token: What turned characters into tokens; known once reading has begun.

    Raises:
        ValueError: A package cannot be had, or the path holds nothing.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        cache: str | os.PathLike[str] | None,
        quiet: bool = False,
        report: ReadReport | None = None,
        tests: Grams | None = None,
        hits: HitList | None = None,
    ) -> None:
        self.source, self.recipe = source, recipe
        self.report = report if report is not None else ReadReport()
        self.counts = LengthCounts()
        self.filter = None
        if recipe.decontaminate is not None:
            grams = tests if tests is not None else read_tests(recipe.decontaminate, cache, quiet)
            self.filter = Filter(recipe.decontaminate, grams, self.report, hits)
        self.characters_per_token = source.characters_per_token
        self.fetched: list[dict[str, Any]] = []
        self.files: list[tuple[str, Path]] = []
        for package in source.packages:
            self.files += list_files(unpack(package, cache, quiet))
            self.fetched.append(describe(package, cache))
        if source.path is not None:
            self.files = list_files(Path(source.path), source.members, source.exclude)
        if source.budget is not None:
            # A budget takes what comes first, so what comes first must not be the beginning of the alphabet.
            self.files.sort(key=self._shuffled)

    def provenance(self) -> dict[str, Any]:
        """What decides which documents come besides the recipe: hashes of packages, sizes and times of local files."""
        digest = hashlib.sha256()
        for name, path in self.files if self.source.path is not None else ():
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        tests = {} if self.filter is None else {"tests": self.filter.grams.sha256}
        return {"packages": [entry["sha256"] for entry in self.fetched], "files": digest.hexdigest(), **tests}

    def documents(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Document]:
        """Read, clean, cut and sample, in a fixed order.

        Args:
            tokenizer: Measures characters per token when the source does not say; without it, Fu et al.'s 3.68.

        Raises:
            ValueError: Bad input under `strict`, or a column that does not exist.
        """
        texts = self._clean(self._read())
        texts = self._cut(texts if self.filter is None else self.filter.documents(texts))
        if self.characters_per_token is None and tokenizer is None:
            self.characters_per_token = FU_CHARACTERS_PER_TOKEN
        elif self.characters_per_token is None:
            self.characters_per_token, texts = _measure(texts, tokenizer)
        yield from sample(
            texts,
            rule=self.recipe.lengths,
            seed=self.recipe.seed,
            budget=self.source.budget,
            characters_per_token=self.characters_per_token,
            counts=self.counts,
        )

    def conversations(self) -> Iterator[Conversation]:
        """The well-formed conversations, with the source's rule for system messages applied; the rest is counted.

        Raises:
            ValueError: A malformed record under `strict`.
        """
        talks = self._conversations()
        yield from talks if self.filter is None else self.filter.conversations(talks)

    def _conversations(self) -> Iterator[Conversation]:
        source, settings = self.source, self.source.read
        reader = Reader(settings, self.report)
        unique = UniqueIds(self.report) if settings.id_field else str
        rows = reader.rows(self.files) if source.dataset is None else reader.dataset_rows(**vars(source.dataset))
        for where, row in rows:
            named = row.get(settings.id_field) if settings.id_field else None
            id = f"{source.name}/{where if named is None else named}"
            # The default field's name is for documents; conversations are found by their shape.
            if settings.field != "text" and settings.field not in row:
                reader.skip(f"no field {settings.field!r}", id)
                continue
            record = row if settings.field == "text" or source.pairs else row[settings.field]
            if isinstance(record, list) and isinstance(row.get("answer"), str):
                record = row
            try:
                messages = to_messages(record, source.style, source.pairs)
            except ValueError as error:
                reader.skip(str(error), id)
                continue
            if source.system is not None:
                messages = [message for message in messages if message["role"] != "system"]
                messages = [*([{"role": "system", "content": source.system}] if source.system else []), *messages]
            yield Conversation(unique(id), messages, source.name, source.license, source.category)

    def notes(self) -> dict[str, Any]:
        """What a report says of the source besides its tokens."""
        return {
            "fetched": self.fetched,
            "characters_per_token": self.characters_per_token,
            "read": self.report.as_json(),
            "lengths": self.counts.as_json(),
            **self.overlap(),
        }

    def overlap(self) -> dict[str, Any]:
        """What a report says of test sets kept out; empty where the recipe keeps out none."""
        return {} if self.filter is None else {"decontaminated": self.filter.overlap.as_json()}

    def _shuffled(self, item: tuple[str, Path]) -> tuple[float, str]:
        """Files of one directory stay together when they become one document.

        The number is another one than the sampling's: were files taken in the order of the numbers that decide on short
        documents, a budget would be filled with those that are kept, and the length rule would do nothing.
        """
        unit = item[0].rpartition("/")[0] if self.source.read.join == "directory" else item[0]
        return uniform(self.recipe.seed, f"order of {self.source.name}/{unit}"), item[0]

    def _read(self) -> Iterator[Document]:
        reader = Reader(self.source.read, self.report)
        if self.source.dataset is not None:
            records = reader.dataset(**vars(self.source.dataset))
            return reader.checked(records, self.source.name, self.source.license)
        return reader.documents(self.files, self.source.name, self.source.license)

    def _clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            text = document.text
            for name in self.source.clean:
                text = CLEANERS[name](text)
            if text.strip():
                yield replace(document, text=text)
            else:
                self.report.skip("empty after cleaning", document.id)

    def _cut(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Cut documents of more than `max_characters` at the last line end before the limit."""
        limit = self.source.max_characters
        for document in documents:
            if limit is None or len(document.text) <= limit:
                yield document
                continue
            start, number = 0, 1
            while start < len(document.text):
                end = min(start + limit, len(document.text))
                if end < len(document.text):
                    end = document.text.rfind("\n", start, end) + 1 or end
                yield replace(document, id=f"{document.id}@{number}", text=document.text[start:end])
                start, number = end, number + 1


def _measure(documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase) -> tuple[float, Iterator[Document]]:
    """Characters per token over the first texts, and the documents from the first one on."""
    first: list[Document] = []
    characters = tokens = 0
    for document in documents:
        first.append(document)
        text = document.text[: MEASURED_CHARACTERS - characters]
        characters += len(text)
        tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if characters >= MEASURED_CHARACTERS:
            break
    return characters / max(1, tokens), itertools.chain(first, documents)
