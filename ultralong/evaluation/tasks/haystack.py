"""Text to hide a needle in: tokenised once, cut at sentences, as long as asked.

N tokens, S sentences.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.prompts import encode_texts

# The filler of the passkey test (Mohtashami and Jaggi 2023), which RULER and InfiniteBench use word for word.
NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n\s*\n")
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, eq=False)
class Haystack:
    """A ring of tokens with the places where sentences start.

    Attributes:
        tokens: (N,) int32 ids; a long prompt goes round more than once.
        starts: (S,) int64 rising, index of each sentence's first token; the first is 0.
        numbers: Every number written in the text, so that an answer can avoid them.
        name: What the text is, for reports.
    """

    tokens: np.ndarray
    starts: np.ndarray
    numbers: frozenset[str]
    name: str

    @classmethod
    def from_texts(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        texts: str | Iterable[str],
        *,
        limit: int | None = None,
        name: str = "documents",
    ) -> Haystack:
        """Tokenise documents sentence by sentence.

        Args:
            tokenizer: Any tokenizer.
            texts: One text or documents in order. Runs of white space become one space; a document starts a new line.
            limit: Stop after this many tokens; None takes everything.
            name: What the text is, for reports.

        Raises:
            ValueError: There is no text.
        """
        lead = sentence_lead(tokenizer)
        pieces: list[np.ndarray] = []
        numbers: set[str] = set()
        total = 0
        for batch in _batches([texts] if isinstance(texts, str) else texts, lead):
            numbers.update(number for text in batch for number in re.findall(r"\d+", text))
            for ids in encode_texts(tokenizer, batch):
                pieces.append(np.asarray(ids, np.int32))
                total += len(ids)
            if limit is not None and total >= limit:
                break
        pieces = [piece for piece in pieces if len(piece)]
        if not pieces:
            raise ValueError("The haystack is empty: give at least one document with text in it.")
        ends = np.cumsum([len(piece) for piece in pieces])
        return cls(np.concatenate(pieces), np.concatenate([[0], ends[:-1]]), frozenset(numbers), name)

    @classmethod
    def noise(cls, tokenizer: PreTrainedTokenizerBase) -> Haystack:
        """One line of filler, repeated without end: the easiest haystack, which tests positions and nothing else."""
        return cls.from_texts(tokenizer, NOISE_LINE, name="repeated noise")

    def take(self, start: int, count: int) -> np.ndarray:
        """(count,) tokens from index `start` on, round the ring as often as needed."""
        return self.tokens[np.arange(start, start + count) % len(self.tokens)]

    def nearest_cut(self, start: int, wanted: int, count: int) -> int:
        """Where to cut `take(start, count)` so that a sentence ends there, as near to `wanted` tokens as can be.

        Where sentences are so long that the nearest border is off by more than a twentieth, the cut is made at
        `wanted` itself: depth matters more than grammar.
        """
        laps, place = divmod(start + wanted, len(self.tokens))
        index = int(np.searchsorted(self.starts, place))
        borders = [self.starts[index - 1]] if index else [0]
        borders.append(self.starts[index] if index < len(self.starts) else len(self.tokens))
        cuts = [int(border) + laps * len(self.tokens) - start for border in borders]
        # The needle may always stand first or last.
        cuts = [cut for cut in [*cuts, 0, count] if 0 <= cut <= count]
        cut = min(cuts, key=lambda cut: abs(cut - wanted))
        return cut if abs(cut - wanted) <= max(count // 20, 1) else wanted


def read_haystack(path: str | os.PathLike[str] | None) -> list[str] | None:
    """Texts of a file, or of all `.txt` and `.md` files under a folder in the order of their names.

    Raises:
        ValueError: There is nothing to read.
    """
    if path is None:
        return None
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} holds no text to hide a needle in: give a text file, or a folder with .txt files.")
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def split_sentences(text: str) -> list[str]:
    """Sentences by punctuation and capitals, with white space collapsed; joined by spaces they are the text."""
    sentences = (" ".join(part.split()) for part in _parts(text))
    return [sentence for sentence in sentences if sentence]


def _parts(text: str) -> Iterator[str]:
    start = 0
    for match in SENTENCE_END.finditer(text):
        # Closing quotes belong to the sentence that ends.
        border = match.end() - len(match.group()) + len(match.group().rstrip())
        yield text[start:border]
        start = match.end()
    yield text[start:]


def _batches(texts: Iterable[str], lead: str) -> Iterator[list[str]]:
    """Sentences with what stands in front of them, about a megabyte at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        for index, sentence in enumerate(split_sentences(text)):
            batch.append((lead if index else "\n") + sentence)
            size += len(sentence)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def sentence_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put in front of a sentence so that pieces encoded apart read as one text when joined.

    A space for byte-level tokenizers; nothing for those that add a space of their own in front of every text.
    """
    for lead in (" ", ""):
        ids = [
            token
            for text in ("One.", lead + "Two.")
            for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        if str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() == "One. Two.":
            return lead
    return " "
