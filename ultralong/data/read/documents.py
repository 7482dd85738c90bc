"""What a document is, and what happened while documents were read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

EXAMPLES_KEPT = 5


@dataclass(frozen=True)
class Document:
    """One text that stands for itself: a book, a page, a source file, an article.

    Attributes:
        id: Unique within the corpus and stable from run to run: sampling depends on it.
        text: The text, without any token that stands for begin or end.
        source: Name of the source it belongs to, as in the recipe.
        license: The licence it comes under, as in the recipe; carried into every manifest.
    """

    id: str
    text: str
    source: str = "local"
    license: str = "unknown"


class SkipLog:
    """A file with a JSON line for everything that was left out or noted; it begins anew in each run.

    Args:
        path: The file; created with the first line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stream: TextIO | None = None

    def add(self, reason: str, where: str) -> None:
        """Write what was left out or noted, and which it was."""
        self.put(json.dumps({"reason": reason, "where": where}))

    def put(self, line: str) -> None:
        """Write a line of JSON."""
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line at a time, so that a kill leaves no finished corpus with an unfinished list beside it.
            self._stream = open(self.path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close
        self._stream.write(line + "\n")

    def close(self) -> None:
        """Write out what is left."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class UniqueIds:
    """Gives a repeated id a name of its own, as ids decide on sampling and two documents must not share a fate.

    It remembers 8 bytes of every id, about 100 with what Python adds: 1 GB for ten million, so only sources that name
    their own ids go through it.

    Args:
        report: Where repetitions are noted.
    """

    def __init__(self, report: ReadReport) -> None:
        self.report = report
        self._seen: set[int] = set()
        self._times: Counter[str] = Counter()

    def __call__(self, id: str) -> str:
        """The id, or for its n-th appearance `id~n`."""
        key = int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if key not in self._seen:
            self._seen.add(key)
            return id
        self._times[id] += 1
        self.report.note("repeated id", id)
        return f"{id}~{self._times[id] + 1}"


def nothing_taken() -> dict[str, Any]:
    """What is counted of a source, before anything of it is taken."""
    return {"documents": 0, "tokens": 0, "characters": 0, "licenses": {}}


@dataclass
class ReadReport:
    """Counts what was read and what was left out, with a few examples of each reason.

    A corpus of millions of documents always holds some that are broken. They are skipped, never silently: each skip is
    counted under its reason, and the first few are kept by name so that one can go and look.

    Attributes:
        documents: How many were read.
        characters: Their characters.
        skipped: How many were left out, by reason.
        noted: How many were kept although something was odd, by what it was.
        examples: The first few of each reason by name.
        unused: In how many records a field was that was not used, by its name.
        every: Where all of those left out or noted are written by name, when that is wanted.
    """

    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    every: SkipLog | None = None

    def read(self, document: Document) -> Document:
        """Count a document and hand it on."""
        self.documents += 1
        self.characters += len(document.text)
        return document

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        """Count `count` items left out for `reason`; `where` names the first of them."""
        self.skipped[reason] += count
        self._name(reason, where)

    def note(self, what: str, where: str) -> None:
        """Count an item that was kept although something about it was odd."""
        self.noted[what] += 1
        self._name(what, where)

    def _name(self, reason: str, where: str) -> None:
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(where)
        if self.every is not None:
            self.every.add(reason, where)

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values, keys in a fixed order."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "skipped": dict(sorted(self.skipped.items())),
            **({"unused_fields": dict(sorted(self.unused.items()))} if self.unused else {}),
            **({"noted": dict(sorted(self.noted.items()))} if self.noted else {}),
            "examples": {reason: list(names) for reason, names in sorted(self.examples.items())},
        }

    def __str__(self) -> str:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{self.documents:,} documents, {self.characters:,} characters" + (
            f"; skipped: {skipped}" if skipped else ""
        )
