"""What the official code fixes for each published set, read from YAML: prompts, budgets, scores, word lists."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from pathlib import Path

from ultralong.utils import settings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PublishedSet:
    """One set.

    Attributes:
        language: en or zh.
        max_new_tokens: Tokens to answer in.
        score: Name of a function of `scores`.
        prompt: The user's message, with the fields of a row in braces.
        plain: The same for a model without a chat template, where it differs.
        cue: With `plain`: the end of the prompt, which the answer continues.
    """

    language: str
    max_new_tokens: int
    score: str
    prompt: str
    plain: str | None = None
    cue: str = ""


@dataclass(frozen=True)
class Catalogue:
    """The sets of one benchmark by name."""

    sets: dict[str, PublishedSet]


@dataclass(frozen=True)
class Words:
    """Words that carry no meaning by themselves, by language, and the marks that Chinese scores drop."""

    english: list[str]
    chinese: list[str]
    chinese_marks: str


@functools.cache
def catalogue(benchmark: str) -> dict[str, PublishedSet]:
    """The sets of `lveval` or `infinitebench`."""
    return settings.load(Catalogue, HERE / f"{benchmark}.yaml").sets


@functools.cache
def idle_words(language: str) -> frozenset[str]:
    """LV-Eval's blacklist of a language, en or zh."""
    words = settings.load(Words, HERE / "words.yaml")
    return frozenset(words.english if language == "en" else words.chinese)


@functools.cache
def marks() -> frozenset[str]:
    """Punctuation that Chinese scores drop, ASCII's included."""
    return frozenset(settings.load(Words, HERE / "words.yaml").chinese_marks + string.punctuation)
