"""Keep the tests out of the training data: what shares words with a test item is left out or cut, and reported.

The rule of overlap is in `overlap`. What is done about it is a choice: `drop` leaves the text out (for conversations
always), `cut` does what GPT-3 did with web pages (Brown et al. 2020, appendix C): the shared words go, with 200
characters on either side; of what is left, pieces of less than 200 characters go too; and a document that would fall
into more than 10 pieces is left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import Document, ReadReport, SkipLog
from ultralong.data.read.fetch import Package, unpack
from ultralong.data.read.readers import ReadSettings, RecordReader, list_files
from ultralong.data.select.overlap import NgramIndex, Overlap, spans_of
from ultralong.utils.words import expand_home

WINDOW = 200  # characters on either side of the shared words
SHORTEST_PIECE = 200
MOST_PIECES = 10


@dataclass(frozen=True)
class TestSet:
    """A test set given as files.

    Attributes:
        name: What reports call it.
        path: A file or folder on this machine (text, JSON lines, JSON, Parquet), relative to the recipe.
        packages: Or files on package registries.
        include: Shell patterns of the files wanted.
        fields: Fields of a record that are looked for, each as an item of its own; empty takes every text in it.
    """

    __test__ = False  # its name is no sign for pytest
    RENAMED: ClassVar[dict[str, str]] = {"members": "include"}

    name: str
    path: str | None = None
    packages: tuple[Package, ...] = ()
    include: tuple[str, ...] = ("*",)
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expand_home(self, "path")
        if (self.path is None) == (not self.packages):
            raise ValueError(f"test set {self.name!r} needs either path or packages.")


@dataclass(frozen=True)
class Decontaminate:
    """What is kept out and how.

    Attributes:
        against: The test sets.
        words: Words of a gram.
        shortest: Words of the shortest item that is looked for as a whole.
        action: "drop" or "cut"; conversations are always dropped.
    """

    against: tuple[TestSet, ...]
    words: int = 13
    shortest: int = 8
    action: Literal["drop", "cut"] = "drop"

    def __post_init__(self) -> None:
        if not self.against:
            raise ValueError("against: at least one test set is needed.")
        if not 1 <= self.shortest <= self.words:
            raise ValueError(f"shortest {self.shortest} must lie in 1..words {self.words}.")


def read_tests(settings: Decontaminate, cache: str | os.PathLike[str] | None = None, quiet: bool = False) -> NgramIndex:
    """The grams of all test sets.

    Raises:
        ValueError: A test set cannot be had or read, holds something broken, or lacks a field.
    """
    return NgramIndex(
        (entry for test in settings.against for entry in _items(test, cache, quiet)), settings.words, settings.shortest
    )


def _items(test: TestSet, cache: str | os.PathLike[str] | None, quiet: bool) -> Iterator[tuple[str, str, str]]:
    files = list_files(Path(test.path), test.include) if test.path is not None else []
    for package in test.packages:
        files += list_files(unpack(package, cache, quiet), test.include)
    # A test item that cannot be read cannot be kept out, so here anything broken is an error.
    for name, row in RecordReader(ReadSettings(strict=True)).rows(files):
        missing = [key for key in test.fields if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"test set {test.name}: {name} has no field {', '.join(map(repr, missing))}.")
        values = [row[key] for key in test.fields] if test.fields else row
        yield from ((test.name, f"{name}#{n}" if n else name, text) for n, text in enumerate(_texts(values)))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


@dataclass
class OverlapReport:
    """What was found; `as_json` is what reports hold."""

    grams: NgramIndex
    settings: Decontaminate
    checked: int = 0
    found: Counter[str] = field(default_factory=Counter)
    tests: Counter[str] = field(default_factory=Counter)
    items: set[tuple[str, str]] = field(default_factory=set)

    def as_json(self) -> dict[str, Any]:
        """Texts checked, dropped and cut; texts hit by each test set; items hit of each; what was not looked for."""
        hit = Counter(test for test, _ in self.items)
        short, looked_for = self.grams.too_short, self.grams.items
        return {
            "rule": f"{self.settings.words} words in a row, or a whole item of {self.settings.shortest} or more",
            "checked": self.checked,
            "dropped": self.found["dropped"],
            "cut": self.found["cut"],
            "tests": {
                test: {
                    "items": looked_for.get(test, 0),
                    "too_short": short.get(test, 0),
                    "items_found": hit[test],
                    "texts_hit": self.tests[test],
                }
                for test in sorted({*short, *looked_for})
            },
        }


class OverlapFilter:
    """Documents or conversations in, clean ones out.

    Args:
        settings: What to do.
        grams: From `read_tests`.
        report: Where what is dropped is counted.
        log: A file with a line for every text hit; None writes none.
    """

    def __init__(
        self, settings: Decontaminate, grams: NgramIndex, report: ReadReport, log: OverlapLog | None = None
    ) -> None:
        self.settings, self.grams, self.report, self.log = settings, grams, report, log
        self.overlap = OverlapReport(grams, settings)

    def documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Clean documents; with "cut", a part's id ends in `!1`, `!2` and so on."""
        for document in documents:
            hits = self.grams.hits(document.text)
            self.overlap.checked += 1
            pieces = cut(document.text, hits) if hits and self.settings.action == "cut" else None
            self._count(document.id, hits, "dropped" if not pieces else "cut")
            if not hits:
                yield document
            for number, piece in enumerate(pieces or (), start=1):
                yield replace(document, id=f"{document.id}!{number}", text=piece)

    def conversations(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """Conversations none of whose turns overlaps."""
        for talk in conversations:
            hits = [hit for message in talk.messages for hit in self.grams.hits(message["content"])]
            self.overlap.checked += 1
            self._count(talk.id, hits, "dropped")
            if not hits:
                yield talk

    def _count(self, id: str, hits: list[Overlap], action: str) -> None:
        if not hits:
            return
        self.overlap.found[action] += 1
        self.overlap.tests.update({hit.test for hit in hits})
        self.overlap.items.update((hit.test, hit.item) for hit in hits)
        if action == "dropped":
            self.report.skip("overlaps with a test", id)
        else:
            self.report.note("cut where it overlaps with a test", id)
        if self.log is not None:
            self.log.write(id, action, hits)


def cut(text: str, hits: list[Overlap]) -> list[str]:
    """What is left of a text without the shared words and their surroundings; empty when too little or too much cut.

    Args:
        text: The text.
        hits: Where it overlaps; at least one.
    """
    spans = spans_of(text)
    pieces, place = [], 0
    for hit in hits:
        start, end = spans[hit.start][0] - WINDOW, spans[hit.start + hit.words - 1][1] + WINDOW
        if start > place:
            pieces.append(text[place:start])
        place = max(place, end)
    pieces.append(text[place:])
    # GPT-3 counted pieces before it threw the short ones away: a text full of test items is no good in between either.
    if len(pieces) > MOST_PIECES:
        return []
    return [piece for piece in pieces if len(piece) >= SHORTEST_PIECE and piece.strip()]


class OverlapLog(SkipLog):
    """A file with a JSON line for every text that overlaps: what was done, and the first words shared with an item."""

    def write(self, id: str, action: str, hits: list[Overlap]) -> None:
        """Write a line."""
        first = {(hit.test, hit.item): hit.gram for hit in reversed(hits)}
        shared = [{"test": test, "item": item, "words": gram} for (test, item), gram in reversed(first.items())]
        self.put(json.dumps({"id": id, "action": action, "grams": len(hits), "shared": shared}, ensure_ascii=False))
