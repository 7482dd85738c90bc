"""A recipe's source, opened: its files on this machine, and the documents or conversations that come out of them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralong.data.read.conversations import LISTS, Conversation, to_messages
from ultralong.data.read.datasets import dataset_rows
from ultralong.data.read.documents import Document, ReadReport
from ultralong.data.read.fetch import describe, unpack
from ultralong.data.read.listing import files_digest, readable
from ultralong.data.read.messages import Message, check_messages, from_first_question
from ultralong.data.read.readers import RecordReader, list_files
from ultralong.data.recipe.rate import MEASURED_TEXTS, conversation_tokens, measured
from ultralong.data.recipe.schema import Recipe, Source
from ultralong.data.select.clean import CLEANERS, cut
from ultralong.data.select.decontaminate import OverlapFilter, OverlapLog, read_tests
from ultralong.data.select.length_rule import FU_CHARACTERS_PER_TOKEN, LengthCounts, sample, sample_subsets, uniform
from ultralong.data.select.overlap import NgramIndex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SourceReader:
    """One source of a recipe, its packages fetched and its files listed.

    Args:
        source: The source.
        recipe: The recipe it belongs to: length rule and seed.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.
        report: Where skips are counted; a new one when None.
        tests: The grams of the recipe's test sets, when they were read already.
        hits: Where texts that overlap with a test are listed.
        part: Read only part i of n: of its files, what becomes one document staying together, or of its stream.

    Attributes:
        fetched: What was fetched: registry, name, file, bytes and hash of each package.
        report: What was read and what was skipped.
        budgets: Tokens wanted of the source, or of each of its subsets, by the name that documents carry.
        counts: Lengths before and after sampling, by the same names.
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
        tests: NgramIndex | None = None,
        hits: OverlapLog | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.source, self.recipe = source, recipe
        self.report = report if report is not None else ReadReport()
        self.budgets = recipe.budgets(source)
        self.counts = {name: LengthCounts() for name in self.budgets}
        self.filter = None
        if recipe.decontaminate is not None:
            grams = tests if tests is not None else read_tests(recipe.decontaminate, cache, quiet)
            self.filter = OverlapFilter(recipe.decontaminate, grams, self.report, hits)
        self.characters_per_token = source.characters_per_token
        self.fetched: list[dict[str, Any]] = []
        self.files: list[tuple[str, Path]] = []
        for package in source.packages:
            self.files += list_files(unpack(package, cache, quiet), report=self.report)
            self.fetched.append(describe(package, cache))
        if source.path is not None:
            self.files = list_files(Path(source.path), source.include, source.exclude, self.report)
        self.part = part
        if part[1] > 1:
            units = {unit: number for number, unit in enumerate(dict.fromkeys(map(self._unit, self.files)))}
            self.files = [item for item in self.files if units[self._unit(item)] % part[1] == part[0]]
        if any(budget is not None for budget in self.budgets.values()):
            # A budget takes what comes first, so what comes first must not be the beginning of the alphabet.
            self.files.sort(key=self._shuffled)

    def provenance(self) -> dict[str, Any]:
        """What decides which documents come besides the recipe: hashes of packages, sizes and times of local files."""
        files = files_digest(self.files if self.source.path is not None else ())
        tests = {} if self.filter is None else {"tests": self.filter.grams.sha256}
        return {"packages": [entry["sha256"] for entry in self.fetched], "files": files, **tests}

    def documents(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Document]:
        """Read, clean, cut and sample, in a fixed order.

        Args:
            tokenizer: Measures characters per token when the source does not say; without it, Fu et al.'s 3.68.

        Raises:
            ValueError: Bad input under `strict`, or a column that does not exist.
        """
        texts, recipe, name = self.texts(), self.recipe, self.source.name
        if self.characters_per_token is None:
            self.characters_per_token = FU_CHARACTERS_PER_TOKEN
            if tokenizer is not None:
                texts = self.measure(texts, tokenizer)
        rule, seed, rate = recipe.length_rule, recipe.seed, self.characters_per_token
        if self.source.subsets is not None:
            budgets = {subset: math.inf if budget is None else budget for subset, budget in self.budgets.items()}
            yield from sample_subsets(
                texts, budgets, rule=rule, seed=seed, characters_per_token=rate, counts=self.counts
            )
        else:
            budget, counts = self.budgets[name], self.counts[name]
            yield from sample(texts, rule=rule, seed=seed, characters_per_token=rate, budget=budget, counts=counts)

    def texts(self) -> Iterator[Document]:
        """Read, clean, keep tests out, cut and put facts in, but do not sample."""
        texts = self._clean(self._read())
        texts = cut(texts if self.filter is None else self.filter.documents(texts), self.source.max_characters)
        practice = self.source.retrieval
        return texts if practice is None else practice.documents(texts, self.recipe.seed)

    def measure(self, texts: Iterator[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
        """Find `characters_per_token`; returns `texts`, whole."""
        if self.files:
            self.characters_per_token = measured(self._spread(), tokenizer)
            return texts
        first = list(itertools.islice(texts, MEASURED_TEXTS))  # a stream has a beginning and nothing else
        self.characters_per_token = measured((document.text for document in first), tokenizer)
        return itertools.chain(first, texts)

    def conversations(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Conversation]:
        """The well-formed conversations, with the source's rule for system messages applied; the rest is counted.

        A budget is met within one conversation, by characters (3.68 a token where the source does not say).

        Args:
            tokenizer: Measures the conversations that are made here (`retrieval_chat`); without it, by characters too.

        Raises:
            ValueError: A malformed record under `strict`, or a text that makes no conversation of the wanted length.
        """
        talks = self._conversations() if self.source.retrieval_chat is None else self._made(tokenizer)
        budget, rate = self.budgets[self.source.name], self.source.characters_per_token or FU_CHARACTERS_PER_TOKEN
        left = math.inf if budget is None else budget * rate
        for talk in talks if self.filter is None else self.filter.conversations(talks):
            yield talk
            left -= talk.characters
            if left <= 0:
                break

    def _conversations(self) -> Iterator[Conversation]:
        source, settings = self.source, self.source.read
        reader = RecordReader(settings, self.report)
        for where, row in self._rows(reader):
            id = readable(f"{source.name}/{reader.id_of(row, where)}")
            # The default field's name is for documents; conversations are found by their shape.
            if settings.field != "text" and settings.field not in row:
                reader.skip(f"no field {settings.field!r}", id)
                continue
            record = row if settings.field == "text" or source.pair_fields else _record_of(row, settings.field)
            unused: set[str] = set()
            try:
                whole = to_messages(record, source.style, source.pair_fields, unused)
                messages = from_first_question(whole)
                check_messages(messages)
            except ValueError as error:
                reader.skip(str(error), id)
                continue
            self.report.unused.update(unused - {settings.id_field})
            if len(messages) < len(whole):
                self.report.note("an answer before the first question left off", id)
            if source.system is not None:
                messages = [message for message in messages if message["role"] != "system"]
                messages = [*([{"role": "system", "content": source.system}] if source.system else []), *messages]
            yield Conversation(reader.unique(id), messages, source.name, source.license, source.category)

    def _made(self, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Conversation]:
        """Conversations about the source's documents."""
        source = self.source
        assert source.retrieval_chat is not None
        system: list[Message] = [{"role": "system", "content": source.system}] if source.system else []
        rate = source.characters_per_token or FU_CHARACTERS_PER_TOKEN
        measure = partial(conversation_tokens, tokenizer=tokenizer, system=system, characters_per_token=rate)
        made = source.retrieval_chat.conversations(self.texts, self.recipe.seed, measure, source.name, source.category)
        return (replace(talk, messages=system + talk.messages) for talk in made)

    def notes(self) -> dict[str, dict[str, Any]]:
        """What a report says of the source, or of each of its subsets, besides its tokens."""
        return {
            name: {
                "fetched": self.fetched,
                "characters_per_token": self.characters_per_token,
                "budget": self.budgets[name],
                "read": self.report.as_json(),
                "lengths": counts.as_json(),
                **self.overlap(),
            }
            for name, counts in self.counts.items()
        }

    def overlap(self) -> dict[str, Any]:
        """What a report says of test sets kept out; empty where the recipe keeps out none."""
        return {} if self.filter is None else {"decontaminated": self.filter.overlap.as_json()}

    def _shuffled(self, item: tuple[str, Path]) -> tuple[float, str]:
        """A file's place where a budget will not reach all of them.

        The number is another one than the sampling's: were files taken in the order of the numbers that decide on short
        documents, a budget would be filled with those that are kept, and the length rule would do nothing.
        """
        return uniform(self.recipe.seed, f"order of {self.source.name}/{self._unit(item)}"), item[0]

    def _unit(self, item: tuple[str, Path]) -> str:
        """What belongs together: files of one directory, when they become one document."""
        return item[0].rpartition("/")[0] if self.source.read.join == "directory" else item[0]

    def _read(self) -> Iterator[Document]:
        reader = RecordReader(self.source.read, self.report)
        if self.source.subsets is not None:
            return self._read_subsets(reader)
        if self.source.dataset is not None:
            records = reader.dataset(self.source.dataset, self.recipe.seed, self.part)
            return reader.checked(records, self.source.name, self.source.license)
        return reader.documents(self.files, self.source.name, self.source.license)

    def _rows(self, reader: RecordReader) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.source.dataset is None:
            return reader.rows(self.files)
        return dataset_rows(self.source.dataset, self.recipe.seed, self.part)

    def _read_subsets(self, reader: RecordReader) -> Iterator[Document]:
        """Documents that carry the name of their part; records of no wanted part are counted and left out."""
        settings, license = self.source.read, self.source.license
        assert self.source.subsets is not None
        for where, row in self._rows(reader):
            part: Any = row
            for key in self.source.subsets.field.split("."):
                part = part.get(key) if isinstance(part, dict) else None
            name = f"{self.source.name}/{part}"
            if name not in self.budgets:
                reader.skip("of no wanted part", where)
            elif settings.field not in row:
                reader.skip(f"no field {settings.field!r}", where)
            else:
                yield from reader.checked([(reader.id_of(row, where), row[settings.field])], name, license)

    def _cleaned(self, text: str) -> str:
        for name in self.source.clean:
            text = CLEANERS[name](text)
        return text

    def _clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            text = self._cleaned(document.text)
            if text.strip():
                yield replace(document, text=text)
            else:
                self.report.skip("empty after cleaning", document.id)

    def _spread(self) -> Iterator[str]:
        """Texts from all over the source: a manual at its front says little about the code behind it."""
        files = sorted(self.files)
        count = min(len(files), MEASURED_TEXTS)
        reader = RecordReader(replace(self.source.read, join="file", strict=False))
        for number in range(count):
            documents = reader.documents([files[number * len(files) // count]], self.source.name, "")
            for document in itertools.islice(documents, MEASURED_TEXTS // count):
                yield self._cleaned(document.text)


def _record_of(row: dict[str, Any], field: str) -> Any:
    """What a named field holds; a list of turns together with what stands beside it, which may change its meaning."""
    if not isinstance(row[field], list):
        return row[field]
    return {**{key: value for key, value in row.items() if key not in (field, *LISTS)}, "messages": row[field]}


def why_nothing(noted: dict[str, Any]) -> str:
    """Why a source gave no document: what was left out, with an example of each reason."""
    read = noted["read"]
    skipped = [f"{count:,} {why} ({read['examples'][why][0]})" for why, count in read["skipped"].items()]
    if "holds a conversation" in read["skipped"]:
        skipped.append("which a recipe of `kind: chat` reads (--set kind=chat; see data_recipes/README.md)")
    return ", ".join(skipped) or f"{read['documents']:,} documents were read, and none was taken"
