"""From rows of published sets to prompts: which row is sample k, what is asked, what counts as right."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.evaluation.tasks.published.catalogue import PublishedSet, catalogue
from ultralong.evaluation.tasks.published.rows import HUBS, Rows, find_file
from ultralong.evaluation.tasks.task import Draft, Setting

LETTERS = "ABCD"


@dataclass(frozen=True)
class PublishedReader:
    """Makes prompts of one set from its rows.

    Attributes:
        name: Name of the set with its level.
        benchmark: `lveval` or `infinitebench`.
        known: What the official code fixes for it.
        chat: Whether the prompt goes into a chat template.
        rows: The data.
    """

    name: str
    benchmark: str
    known: PublishedSet
    chat: bool
    rows: Rows

    @property
    def source(self) -> str:
        """What the text is."""
        return f"{HUBS[self.benchmark]}, {self.rows.path.name}"

    def __len__(self) -> int:
        return len(self.rows)

    def draft(self, seed: int, index: int) -> Draft:
        """Sample `index`: rows come in an order drawn from the seed, because neighbours are alike.

        LV-Eval's fact recall, for one, moves its fact through the text from the first row to the last.
        """
        number = _order(self.name, len(self.rows), seed)[index]
        row = self.rows[number]
        missing = [field for field in self._fields() if field not in row]
        if missing:
            raise ValueError(
                f"{self.rows.path}, row {number + 1} has no {' and no '.join(missing)}: it is not of "
                f"{HUBS[self.benchmark]}."
            )
        plain = self.known.plain if not self.chat and self.known.plain is not None else None
        words = {
            "context": row["context"],
            "input": row["input"],
            **dict(zip(LETTERS, row.get("options") or (), strict=False)),
        }
        message = _fill(self.known.prompt if plain is None else plain, words)
        outputs, extra = self._expected(row, number)
        return Draft(message, "" if plain is None else self.known.cue, outputs, extra={"row": number, **extra})

    def _fields(self) -> tuple[str, ...]:
        if self.benchmark == "lveval":
            return ("context", "input", "answers")
        return ("context", "input", "answer", *(("options",) if "{A}" in self.known.prompt else ()))

    def _expected(self, row: Mapping[str, Any], number: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """References, and what else scoring needs."""
        if self.benchmark == "lveval":
            return tuple(row["answers"]), {"keywords": row.get("answer_keywords") or None}
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        if "{A}" not in self.known.prompt:
            return tuple(answers), {}
        options = list(row["options"])
        if len(answers) == 1 and answers[0] in options:
            answers.append(LETTERS[options.index(answers[0])])
        if len(answers) != 2 or answers[1] not in LETTERS:
            raise ValueError(f"{self.rows.path}, row {number + 1}: the answer {answers} is none of the options.")
        return tuple(answers), {}


@functools.lru_cache(maxsize=64)
def _order(name: str, count: int, seed: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{name} {seed}").shuffle(order)
    return tuple(order)


def _fill(template: str, words: Mapping[str, str]) -> str:
    """The template with its fields filled in, one pass from left to right: a book may hold braces of its own."""
    pieces = []
    rest = template
    while rest:
        places = [(rest.index(mark), mark, text) for field, text in words.items() if (mark := f"{{{field}}}") in rest]
        if not places:
            break
        place, mark, text = min(places)
        pieces += [rest[:place], text]
        rest = rest[place + len(mark) :]
    return "".join([*pieces, rest])


@functools.lru_cache(maxsize=8)
def _rows(path: Path) -> Rows:
    return Rows(path)


def prepare(benchmark: str, name: str, level: str | None, setting: Setting) -> PublishedReader:
    """The reader over the caller's files or the hub's.

    Args:
        benchmark: `lveval` or `infinitebench`.
        name: Name of the set.
        level: LV-Eval's length level, such as `16k`.
        setting: Names a file or folder in `questions`; None asks the hub.

    Raises:
        ValueError: The data is not there.
    """
    whole = name if level is None else f"{name}_{level}"
    path = find_file(benchmark, whole, None if level is None else f"{name}.zip", setting.questions)
    return PublishedReader(whole, benchmark, catalogue(benchmark)[name], setting.chat, _rows(path))
