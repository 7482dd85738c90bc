"""The frame around a test: the tokenizer's chat template where it has one, and text to ids without surprises."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Survives templates that strip or rewrite what surrounds the message.
MARK = "\u2402message\u2403"


@dataclass(frozen=True)
class Frame:
    """What stands before and after a user's message.

    Attributes:
        before: Text in front of the message, special tokens written out.
        after: Text behind it, up to where the assistant starts to speak.
        leading: Ids in front of everything, such as the start-of-text token of a tokenizer used without a template.
    """

    before: str
    after: str
    leading: tuple[int, ...]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` alone: nothing added in front or behind, special tokens in it recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def make_frame(tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> Frame:
    """The frame for a user's message.

    Args:
        tokenizer: Any tokenizer.
        chat: True takes the chat template, False none; None takes it where there is one.

    Raises:
        ValueError: `chat` is True and there is no template, or the template drops the message.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return Frame("", "", _leading_ids(tokenizer))
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template: evaluate with chat=False (a plain prompt), or save a "
            "template with the tokenizer."
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(MARK)
    if not found:
        raise ValueError("The tokenizer's chat template does not repeat the user's message: it cannot be used here.")
    return Frame(before, after, ())


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the tokenizer puts in front of a plain text on its own."""
    plain = encode(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `text` and of the answer that follows it, as the tokenizer splits them when they stand together.

    Where the split of the two together cuts across their border, each is encoded alone.

    Args:
        tokenizer: Any tokenizer.
        text: End of the prompt.
        answer: What follows, with its leading space if it has one.
    """
    head, whole = encode(tokenizer, text), encode(tokenizer, text + answer)
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    return head, encode(tokenizer, answer)
