"""Which test items occur in a text: exact overlap of word n-grams.

The rule is GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C): a word is what stands between white space, in
lower case and without punctuation; a text overlaps with a test item when they share 13 words in a row. The same
appendix uses fewer words, 8 at least, for tests whose items are shorter: an item of 8 to 12 words has to occur as a
whole. Shorter items would match ordinary speech; they are not looked for, and counted.

N words in a text, n words in a gram.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NO_WORD = re.compile(r"[^\w\s]|_")
TOKEN = re.compile(r"\S+")
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's number is lost in the product


@dataclass(frozen=True)
class Overlap:
    """Where a text and a test item share words.

    Attributes:
        test: The test set.
        item: The item's name in it.
        gram: The words they share: the first gram of them.
        start: Its first word in the text.
        words: How many words the gram has.
    """

    test: str
    item: str
    gram: str
    start: int
    words: int


def words_of(text: str) -> list[str]:
    """The words of a text under the rule."""
    return TOKEN.findall(NO_WORD.sub("", text.lower()))


def spans_of(text: str) -> list[tuple[int, int]]:
    """Where each word of `words_of(text)` stands in the text, (first character, one past the last)."""
    return [found.span() for found in TOKEN.finditer(text) if NO_WORD.sub("", found[0].lower())]


class NgramIndex:
    """The n-grams of test sets, to look for in texts.

    Args:
        items: (test set, item's name, text) of every item.
        most: Words of a gram.
        least: Words of the shortest item that is looked for as a whole.

    Attributes:
        items: Items that are looked for, by test set.
        too_short: Items that are not, by test set.
        sha256: Names the grams.

    Raises:
        ValueError: `least` or `most` makes no sense, or no item is long enough.
    """

    def __init__(self, items: Iterable[tuple[str, str, str]], most: int = 13, least: int = 8) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"least {least} must lie in 1..most {most}.")
        self.items: dict[str, int] = {}
        self.too_short: dict[str, int] = {}
        self._where: dict[str, tuple[str, str]] = {}
        sizes: dict[int, list[str]] = {}
        for test, name, text in items:
            words = words_of(text)
            counts = self.items if len(words) >= least else self.too_short
            counts[test] = counts.get(test, 0) + 1
            if counts is self.too_short:
                continue
            size = min(most, len(words))
            for start in range(len(words) - size + 1):
                gram = " ".join(words[start : start + size])
                if gram not in self._where:
                    self._where[gram] = (test, name)
                    sizes.setdefault(size, []).append(gram)
        if not self._where:
            raise ValueError(f"no test item has {least} words or more: nothing to look for.")
        self._numbers = {word: n for n, word in enumerate({w for gram in self._where for w in gram.split(" ")}, 1)}
        self._hashes = {
            size: np.unique(np.concatenate([self._hash(self._known(gram.split(" ")), size) for gram in grams]))
            for size, grams in sorted(sizes.items())
        }
        self.sha256 = hashlib.sha256("\n".join(sorted(self._where)).encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return len(self._where)

    def hits(self, text: str) -> list[Overlap]:
        """Every gram of the tests that occurs in a text, in order of its place."""
        words = words_of(text)
        numbers = self._known(words)
        found = []
        for size, wanted in self._hashes.items():
            if numbers.size < size:
                continue
            # A hash of 64 bits names the candidates; the words themselves decide.
            hashes = self._hash(numbers, size)
            places = np.minimum(np.searchsorted(wanted, hashes), wanted.size - 1)
            for start in np.flatnonzero(wanted[places] == hashes).tolist():
                gram = " ".join(words[start : start + size])
                if gram in self._where:
                    found.append(Overlap(*self._where[gram], gram, start, size))
        return sorted(found, key=lambda hit: (hit.start, hit.words))

    def _known(self, words: list[str]) -> np.ndarray:
        """(N,) uint64: each word's number, 0 for a word that no test holds."""
        get = self._numbers.get
        return np.fromiter((get(word, 0) for word in words), dtype=np.uint64, count=len(words))

    @staticmethod
    def _hash(numbers: np.ndarray, size: int) -> np.ndarray:
        """(N - size + 1,) uint64: a polynomial hash of every window of `size` words."""
        windows = numbers.size - size + 1
        total = np.zeros(windows, dtype=np.uint64)
        for offset in range(size):
            total = total * PRIME + numbers[offset : offset + windows]
            total ^= total >> np.uint64(29)
        return total
