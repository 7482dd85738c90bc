"""What a document is, and what happened while documents were read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class ReadReport:
    """Counts what was read and what was left out, with a few examples of each reason.

    A corpus of millions of documents always holds some that are broken. They are skipped, never silently: each skip is
    counted under its reason, and the first few are kept by name so that one can go and look.
    """

    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def read(self, document: Document) -> Document:
        """Count a document and hand it on."""
        self.documents += 1
        self.characters += len(document.text)
        return document

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        """Count `count` items left out for `reason`; `where` names the first of them."""
        self.skipped[reason] += count
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(where)

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values, keys in a fixed order."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "skipped": dict(sorted(self.skipped.items())),
            "examples": {reason: list(names) for reason, names in sorted(self.examples.items())},
        }

    def __str__(self) -> str:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{self.documents:,} documents, {self.characters:,} characters" + (
            f"; skipped: {skipped}" if skipped else ""
        )
