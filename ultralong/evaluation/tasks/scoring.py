"""Scores as the benchmarks' own code gives them, one answer at a time, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x1f]")
KV_SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
CODE_SEPARATORS = str.maketrans(dict.fromkeys("\n.`'\":", " "))


def clean_answer(answer: str) -> str:
    """RULER's clean-up of an answer: ends stripped, control characters to line breaks."""
    return CONTROL.sub("\n", answer.strip()).strip()


def match_all(answer: str, references: Sequence[str]) -> float:
    """RULER's `string_match_all`: share of the references that occur in the answer, letter case aside."""
    text = clean_answer(answer).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """RULER's `string_match_part`: whether any reference occurs in the answer, letter case aside.

    NVIDIA's definition. lm-eval's function of this name divides by the number of references, so it reads low where a
    question has several.
    """
    text = clean_answer(answer).lower()
    return float(any(reference.lower() in text for reference in references))


def first_integer(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's passkey and number string: the first run of digits is the reference, digit for digit."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found.group() == references[0])


def whole_word(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's key-value retrieval: the reference is a word of the answer, punctuation aside."""
    return float(references[0] in answer.translate(KV_SEPARATORS).split())


def last_integer(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's code run: the last word is an integer and equals the reference."""
    words = answer.strip().translate(CODE_SEPARATORS).split()
    try:
        return float(bool(words) and int(words[-1]) == int(references[0]))
    except ValueError:
        return 0.0


def first_number(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's math find: the first integer or decimal equals the reference.

    Where the reference is an integer and the answer a decimal, the official code stops with an error; here it is wrong.
    """
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    if "." in references[0]:
        return float(float(found.group()) == float(references[0]))
    return float("." not in found.group() and int(found.group()) == int(references[0]))


def correct_prefix(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's math calc: share of the references before the first wrong number.

    Numbers are runs of digits. (For GPT-4 the official code drops the first number it said; not done here, because the
    references here hold the first number too.)
    """
    numbers = re.findall(r"[0-9]+", answer)
    right = 0
    for said, wanted in zip(numbers, references, strict=False):
        if int(said) != int(wanted):
            break
        right += 1
    return right / len(references)
