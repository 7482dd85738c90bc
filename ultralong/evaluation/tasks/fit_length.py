"""Make a prompt as long as asked by arithmetic: learn what a unit costs, make it once, correct once or twice.

The published generators grow a prompt step by step and tokenise it again each time, which takes hours at a million
tokens. Here two small prompts give a line (tokens = base + size * cost), which is right to a few per cent; a full
prompt shows the rest of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.prompts import encode_texts
from ultralong.evaluation.tasks.task import Draft

Made = TypeVar("Made")

AIM = 0.9875  # share of the limit that is aimed at: the line may be wrong by as much again without a second prompt
ENOUGH = 0.975
MOST_TRIES = 12
FEWEST_TOKENS = 64  # of a text that is cut
MOST_CUTS = 8


@dataclass(frozen=True)
class Line:
    """Tokens of a prompt as a function of its size."""

    base: float
    cost: float

    def size_for(self, tokens: float) -> int:
        """The largest size that should take at most so many tokens."""
        return int((tokens - self.base) // self.cost)


def learn_line(tokens_of: Callable[[int], int], smallest: int, probe: int) -> Line:
    """The line through two small prompts.

    Args:
        tokens_of: Makes a prompt of a size and counts its tokens.
        smallest: First size.
        probe: Distance to the second.

    Raises:
        ValueError: The larger prompt has no more tokens than the smaller.
    """
    first, second = tokens_of(smallest), tokens_of(smallest + probe)
    if second <= first:
        raise ValueError(
            f"A prompt of {smallest + probe} units has {second} tokens and one of {smallest} has {first}: "
            "the tokenizer does not count this text."
        )
    cost = (second - first) / probe
    return Line(first - cost * smallest, cost)


@dataclass(frozen=True)
class Fitted(Generic[Made]):
    """The prompt found, with its size and tokens."""

    made: Made
    size: int
    tokens: int


def fit(make: Callable[[int], tuple[Made, int]], limit: int, smallest: int, line: Line) -> Fitted[Made]:
    """The first prompt found that fills at least 97.5% of the limit, or the largest one that fits.

    Args:
        make: Makes a prompt of a size and counts its tokens, always the same for the same size.
        limit: Most tokens.
        smallest: Smallest size.
        line: What sizes cost, roughly.

    Raises:
        ValueError: Even the smallest prompt is too long.
    """
    best: Fitted[Made] | None = None
    too_large: int | None = None
    size = max(smallest, line.size_for(AIM * limit))
    for _ in range(MOST_TRIES):
        made, tokens = make(size)
        if tokens > limit:
            too_large = size if too_large is None else min(size, too_large)
            if size == smallest:
                raise ValueError(
                    f"{limit:,} tokens are too few: the shortest prompt of this test takes {tokens:,}. "
                    "Ask at a longer length."
                )
        elif best is None or tokens > best.tokens:
            best = Fitted(made, size, tokens)
        if best is not None and (best.tokens >= ENOUGH * limit or best.size + 1 == too_large):
            break
        # What this prompt cost a unit is nearer the truth than what the small ones did.
        cost = (tokens - line.base) / size if size and tokens > line.base else line.cost
        size += round((AIM * limit - tokens) / cost) or (-1 if tokens > limit else 1)
        lowest = smallest if best is None else best.size + 1
        size = max(lowest, size if too_large is None else min(size, too_large - 1))
    if best is None:
        return fit(make, limit, smallest, Line(line.base, 1.25 * line.cost))
    return best


def truncate_middle(
    tokenizer: PreTrainedTokenizerBase, draft: Draft, limit: int, tokens_of: Callable[[Draft], int]
) -> tuple[Draft, int]:
    """The draft with the middle of its message left out, so that the whole takes at most `limit` tokens.

    Half of the tokens kept are the first ones and half the last. Where a half ends inside a character, as can happen
    with byte-level tokenizers, the text shows the mark of an unknown character there, as in the official code.

    Args:
        tokenizer: Counts the tokens.
        draft: The prompt.
        limit: Most tokens of the framed prompt and the answer.
        tokens_of: Counts those of a draft.

    Returns:
        The draft, and how many tokens it lost (0 for one that fits, which is returned as it is).

    Raises:
        ValueError: The frame, the answer and a few words do not fit.
    """
    total = tokens_of(draft)
    if total <= limit:
        return draft, 0
    (ids,) = encode_texts(tokenizer, [draft.input])
    room = limit - (total - len(ids))
    for _ in range(MOST_CUTS):
        if room < FEWEST_TOKENS:
            raise ValueError(
                f"{limit:,} tokens are too few: frame and answer of this test take "
                f"{total - len(ids):,} and its text needs {FEWEST_TOKENS}."
            )
        half = room // 2
        kept = "".join(
            str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in (ids[:half], ids[-half:])
        )
        short = replace(draft, input=kept)
        over = tokens_of(short) - limit
        if over <= 0:
            return short, len(ids) - 2 * half
        # The two halves, encoded again as one text, can take a token or two more.
        room -= over
    raise ValueError(
        f"The tokenizer does not repeat its own text: cut to {room:,} tokens, it still takes "
        f"{limit + over:,} of {limit:,}."
    )
