"""Cut a text that is too long in its middle, as LV-Eval's and InfiniteBench's own code does.

What the form of an answer depends on, the task and the question, stands at the two ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.prompts import encode
from ultralong.evaluation.tasks.task import Draft

FEWEST_TOKENS = 64
MOST_TRIES = 8


def cut_to_fit(
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
    ids = encode(tokenizer, draft.input)
    room = limit - (total - len(ids))
    for _ in range(MOST_TRIES):
        if room < FEWEST_TOKENS:
            raise ValueError(
                f"{limit:,} tokens are too few: frame and answer of this test take "
                f"{total - len(ids):,} and its text needs {FEWEST_TOKENS}."
            )
        half = room // 2
        kept = "".join(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:half], ids[-half:]))
        short = replace(draft, input=kept)
        over = tokens_of(short) - limit
        if over <= 0:
            return short, len(ids) - 2 * half
        # The two halves, read anew as one text, can take a token or two more.
        room -= over
    raise ValueError(
        f"The tokenizer does not repeat its own text: cut to {room:,} tokens, it still takes "
        f"{limit + over:,} of {limit:,}."
    )
