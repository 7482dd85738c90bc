"""Characters per token, measured on a few texts of a source, and what a conversation takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ultralong.data.read.messages import Message
from ultralong.data.select.length_rule import FU_CHARACTERS_PER_TOKEN
from ultralong.utils.chat_template import apply_chat_template
from ultralong.utils.hub import tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_TEXTS = 128
MEASURED_CHARACTERS = 1 << 12  # of each, from its middle


def measured(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Characters per token over a piece from the middle of each text; Fu et al.'s 3.68 where there is nothing."""
    characters = tokens = 0
    for text in texts:
        start = max(0, len(text) - MEASURED_CHARACTERS) // 2
        piece = text[start : start + MEASURED_CHARACTERS]
        characters += len(piece)
        with tokenizer_errors("the tokenizer fails at a text"):
            tokens += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    return characters / tokens if tokens else FU_CHARACTERS_PER_TOKEN


def conversation_tokens(
    messages: list[Message],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    system: list[Message],
    characters_per_token: float,
) -> int:
    """Tokens of a conversation under the tokenizer's chat template; by its characters where there is no tokenizer."""
    messages = system + messages
    if tokenizer is None:
        return int(sum(len(message["content"]) for message in messages) / characters_per_token)
    return len(apply_chat_template(tokenizer, messages, tokenize=True))
