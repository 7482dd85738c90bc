"""Long texts encoded in parts, with the ids that the whole text gives.

A tokenizer takes about 170 bytes of memory for each byte of a text, so one document of 25 MB needs 4 GB at once. Here
it is cut where a cut changes nothing. Such places are found, not assumed, as tokenizers differ: around a candidate, a
stretch of text is encoded whole and in two, and the two must give the same ids. Nothing is known about the tokenizer
but that its choice at one place does not depend on text hundreds of characters away. That holds for byte-level BPE,
whose words are short, and for SentencePiece's BPE and unigram models.

Where it does not hold is inside a run: how "aaaa..." or a number of a thousand digits is cut depends on where it begins
or ends. A stretch of the run looks cut well at a place that the whole run is not cut at. So each stretch is looked at
with its begin and its end at three places, which a cut within a run does not survive, and no cut stands between digits.
Between two such places a part has any length: a text that is one run is encoded whole.

A unigram model takes the likeliest way to divide a word. A run has many that are equally likely, and the rounding of
the sum over all that stands before it in the word decides. So its texts are cut between words alone, and those of a
unigram model that does not divide a text into words are not cut.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Cuts = Literal["anywhere", "before spaces", "nowhere"]
EncodeIds = Callable[[list[str]], list[list[int]]]
LONG = 1 << 20  # characters; a shorter text is not cut
PART = 1 << 17  # characters of a part, about
REACH = 384  # characters of a stretch on either side of a candidate
SHIFTS = (0, 1, 3)  # characters that a stretch begins later, or ends earlier
CANDIDATES = 24  # places tried near each part's end, before going on
LONGEST_REPEATED = 16  # characters
CONTEXT = 64  # characters in front of a part, for tokenizers that treat a text's begin in a way of its own


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Attributes:
        start: Its first character.
        end: One past its last character.
        context: Characters in front of it that are encoded with it and left off.
        context_ids: Their ids, which are as many as are left off.
    """

    start: int
    end: int
    context: int = 0
    context_ids: int = 0


def cut_text(text: str, encode: EncodeIds, part: int = PART, cuts: Cuts = "anywhere") -> Iterator[Part]:
    """Parts of a text, in order, whose ids one after the other are the ids of the whole.

    Args:
        text: Any text.
        encode: Ids of texts, without special tokens.
        part: Characters of a part, at least; one ends at the first safe place behind it.
        cuts: Where to cut, where that is safe: anywhere, before a space that ends a word, or nowhere.
    """
    current, place, step = Part(0, len(text)), part, REACH
    while cuts != "nowhere" and place < len(text) - REACH:
        found = _safe_cut(text, place, encode, cuts)
        if found is None:
            # On to what the candidates have not covered; within a long run in ever larger steps.
            place, step = place + step, min(2 * step, part)
            continue
        yield Part(current.start, found.start, current.context, current.context_ids)
        current, place, step = found, found.start + part, REACH
    yield current


def _safe_cut(text: str, place: int, encode: EncodeIds, cuts: Cuts) -> Part | None:
    """A safe place within `REACH` characters behind `place`, as the begin of the next part; None without one."""
    for cut in _candidates(text, place, min(place + REACH, len(text) - 1), cuts):
        for context in (0, CONTEXT):
            ids = _harmless(text, cut, context, encode)
            if ids is not None:
                return Part(cut, len(text), context, ids)
    return None


def _candidates(text: str, start: int, end: int, cuts: Cuts) -> list[int]:
    """Places to cut, the best first: before a space between words, at a line break, where characters change kind."""
    ranked = sorted(
        (rank, cut)
        for cut in range(start, end)
        if (rank := _rank(text[cut - 1], text[cut])) is not None
        and (cuts == "anywhere" or not rank)
        and not _in_repetition(text, cut)
    )
    best = [cut for _, cut in ranked[: CANDIDATES // 2]]
    others = [cut for rank, cut in ranked if rank > (ranked[0][0] if ranked else 0)][: CANDIDATES - len(best)]
    return list(dict.fromkeys([*best, *others]))


def _in_repetition(text: str, cut: int) -> bool:
    """Whether a cut stands within something short that stands there three times: "aaaa", "ababab"."""
    for size in range(1, min(LONGEST_REPEATED, cut) + 1):
        before = text[cut - size : cut]
        if text.startswith(before, cut) and (
            text.startswith(before, cut + size) or (cut >= 2 * size and text.startswith(before, cut - 2 * size))
        ):
            return True
    return False


def _rank(before: str, after: str) -> int | None:
    """How likely a cut between two characters is harmless (0 most); None where it must not be."""
    if (before.isnumeric() and after.isnumeric()) or unicodedata.combining(after):
        return None
    if after == " " and not before.isspace():
        return 0
    if before == "\n" and not after.isspace():
        return 1
    if after == "\n" and not before.isspace():
        return 2
    if before.isspace() or after.isspace():
        return 5
    return 3 if before.isalnum() != after.isalnum() else 4


def _harmless(text: str, cut: int, context: int, encode: EncodeIds) -> int | None:
    """How many ids the context in front of a cut has, where the cut changes nothing; None where it does."""
    start, end = max(0, cut - REACH), min(len(text), cut + REACH)
    if context and cut - context < start:
        return None
    (first,) = encode([text[cut - context : cut]]) if context else [[]]
    for shift in SHIFTS:
        for left, right in {(start + shift, end), (start, end - shift), (start + shift, end - shift)}:
            whole, head, tail = encode([text[left:right], text[left:cut], text[cut - context : right]])
            if tail[: len(first)] != first or whole != head + tail[len(first) :]:
                return None
    return len(first)
