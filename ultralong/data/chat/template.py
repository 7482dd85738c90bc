"""One conversation to token ids and a loss mask, by the tokenizer's own chat template.

Only what the assistant says is learned, up to and with the token that ends its turn: that token is where generation
stops. Two exact ways to find it, and no guess:
* A template with `{% generation %}` marks says so itself.
* Otherwise the conversation is rendered up to the assistant's turn with the generation prompt, which is what the model
  will see when it is used, and once more with the turn. Both have to be prefixes, token by token, of the whole
  conversation; a template that rewrites earlier turns (some drop old reasoning) fails this and is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ultralong.data.read.conversations import Message, check_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], list[int]]:
    """One conversation as token ids and, for each token, 1 where the model is to learn to produce it.

    Args:
        tokenizer: Must have a chat template.
        messages: `{"role", "content"}` each, at least one of them the assistant's.

    Returns:
        `(input_ids, loss_mask)` of equal length. `loss_mask[t]` speaks of token t itself, not yet of the shifted
        target.

    Raises:
        ValueError: No template; a message without role or content; no or an empty answer; a control token inside a
            message; or a template under which the assistant's tokens cannot be told exactly.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        raise ValueError("the tokenizer has no chat template. Set tokenizer.chat_template, or use one that has it.")
    check_messages(messages, control_tokens(tokenizer))
    if GENERATION_MARK.search(template):
        encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        if not any(mask):
            raise ValueError("the chat template's generation marks cover none of the assistant's tokens.")
        return ids, mask
    return _encode_by_prefixes(tokenizer, messages)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every token that the tokenizer reads as a control token when it meets its text."""
    return tuple(sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}))


def _encode_by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], list[int]]:
    ids = _apply(tokenizer, messages, tokenize=True)
    mask = [0] * len(ids)
    special = set(tokenizer.added_tokens_decoder)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError("begins with an answer, before which the chat template has nothing to render")
        before = _apply(tokenizer, messages[:turn], tokenize=True, add_generation_prompt=True)
        upto = _apply(tokenizer, messages[: turn + 1], tokenize=True)
        if ids[: len(before)] != before or ids[: len(upto)] != upto:
            raise ValueError(_why_not(tokenizer, messages, turn))
        # What follows the end-of-turn token (often a line break) opens the next turn and is never generated.
        ends = [place for place in range(len(before), len(upto)) if ids[place] in special]
        end = ends[-1] + 1 if ends else len(upto)
        mask[len(before) : end] = [1] * (end - len(before))
    return ids, mask


def _why_not(tokenizer: PreTrainedTokenizerBase, messages: list[Message], turn: int) -> str:
    """Why a turn's tokens cannot be told apart: is the text already different, or only where tokens are cut?"""
    whole = _apply(tokenizer, messages, tokenize=False)
    before = _apply(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    upto = _apply(tokenizer, messages[: turn + 1], tokenize=False)
    if whole.startswith(before) and whole.startswith(upto):
        return "an answer's edge merges with the template's text into one token (strip the answer's white space)"
    return "the chat template rewrites earlier turns (it needs generation marks, or single-turn examples)"


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> Any:
    """Render with the template; what the template itself refuses (roles out of turn, say) is a ValueError too."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **{"return_dict": False, **options})
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
