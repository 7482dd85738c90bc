"""Units that more than one room counts in; numbers of tokens as people write them: 131072, 131,072, 128k, 1m."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

GIB = 2**30  # bytes
SEEDS = 2**32  # all that numpy takes of a seed
LONGEST = 2**31 - 1  # tokens of one text: positions are numbers of 32 bits with a sign
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class TokenCount:
    """Marks a setting as a number of tokens: settings files and command lines then take units too."""


Tokens = Annotated[int, TokenCount()]


def parse_tokens(text: str) -> int:
    """The number of tokens that a text means; k is 1,024 and m is 1,048,576, as windows are named.

    Args:
        text: Such as "131072", "131,072", "128k" or "1.5m", in any case.

    Raises:
        ValueError: It is no number of tokens, or no whole one.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)([kmg]?)", text.strip().lower())
    value = float(re.sub("[_,]", "", found[1])) * UNITS[found[2]] if found else 0.5
    if value != int(value):
        raise ValueError(
            f"tokens are a whole number such as 131072, 128k or 1m (k is 1,024, m is 1,048,576), found {text!r}."
        )
    return int(value)


def target_window(text: str, window: int) -> int:
    """Tokens of the window that a text asks for: "1048576", "1m", or "8x" for eight times `window`.

    Raises:
        ValueError: It is none of these.
    """
    times = re.fullmatch(r"(\d+(?:\.\d+)?)x", text.strip().lower())
    if times is None:
        return parse_tokens(text)
    tokens = float(times[1]) * window
    if tokens != int(tokens):
        raise ValueError(f"{text} of a window of {window:,} tokens is {tokens:,} tokens: give a whole number.")
    return int(tokens)


def many(count: int, thing: str) -> str:
    """A number of things: "1 row", "2,048 rows"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def check_seed(seed: int) -> None:
    """Refuse a seed that one of the generators behind it does not take: one range holds for all.

    Raises:
        ValueError: It is negative or too large.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be 0 or more and below 2**32, found {seed}.")


def check_length(name: str, tokens: int) -> None:
    """Refuse a length that no position can have, before anything of that length is made.

    Raises:
        ValueError: It is beyond 2,147,483,647 tokens.
    """
    if tokens > LONGEST:
        raise ValueError(f"{name} is {tokens:,} tokens, and a text has at most {LONGEST:,}.")
