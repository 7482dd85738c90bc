"""Stop tokens: what ends an answer, by the model's generation config and by the tokenizer's chat template."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.utils.chat_template import render_chat

ANSWER = "\u2402answer\u2403"  # survives templates that strip or rewrite what surrounds a message


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Ids that end a generation, from the model's generation config or, failing that, its config."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return set() if ids is None else {int(ids)} if isinstance(ids, int) else {int(token) for token in ids}


def turn_end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end the assistant's turn in a tokenizer's chat template, such as Llama-3's `<|eot_id|>`.

    A checkpoint's own end token is often another one: an answer would then run on into a turn of the user that the
    model makes up.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The added token that follows an answer, at the end of a conversation and before another question: where a
        template ends no turn, the token that opens the next one. Empty without a template, or where text follows.
    """
    if not tokenizer.chat_template:
        return set()
    # Also those that are not marked special, as fine-tunes add the ends of turns; some tokenizers add line breaks.
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ANSWER}]
    found: set[int] = set()
    for talk in (turns, [*turns, turns[0]]):
        try:
            text = render_chat(tokenizer, talk)
        except (TemplateError, ValueError):  # what the template refuses, or a set of templates without a default
            continue
        _, answer, behind = text.rpartition(ANSWER)
        if answer:
            found |= set(tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1]) & control
    return found


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer unless others are asked for: the model's, and the ends of the template's turns."""
    return frozenset(end_tokens(model) | turn_end_tokens(tokenizer))
