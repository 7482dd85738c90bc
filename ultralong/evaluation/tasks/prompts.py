"""The frame around a test: the tokenizer's chat template where it has one, and text to ids without surprises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.utils.chat_template import apply_chat_template, control_tokens

# Survives templates that strip or rewrite what surrounds the message.
MARK = "\u2402message\u2403"
LONGEST_MERGE = 32  # characters that no token begins at


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
    """Ids of `text` alone: nothing added in front or behind, control tokens in it recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts that are data: what is spelled like a control token stays text, as in packed rows."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@dataclass(frozen=True)
class EncodedPrompt:
    """A framed prompt as ids.

    Attributes:
        ids: All ids, the frame's leading ones first.
        tokenizer: What encoded it.
        text: The text that the message was encoded in.
        shift: Characters of that text in front of the message.
        encoding: What the tokenizer gave for that text.
        before: Ids in front of those of that text.
    """

    ids: list[int]
    tokenizer: PreTrainedTokenizerBase
    text: str
    shift: int
    encoding: Any
    before: int

    def token_at(self, character: int) -> int:
        """Index of the token at a character of the message; of the next one where a merge swallowed it."""
        at = self.shift + character
        if self.encoding.is_fast:
            found = (self.encoding.char_to_token(place) for place in range(at, at + LONGEST_MERGE))
            return self.before + next(token for token in found if token is not None)
        return self.before + len(encode(self.tokenizer, self.text[:at]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, frame: Frame, message: str, answer_prefix: str) -> EncodedPrompt:
    """A message in its frame, with the start of the answer behind it.

    The frame's control tokens are control tokens; those that the message spells out stay text.

    Args:
        tokenizer: Any tokenizer.
        frame: What stands around the message.
        message: The user's message.
        answer_prefix: Start of the answer.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    leading, tail = list(frame.leading), frame.after + answer_prefix
    pattern = control_tokens(tokenizer)
    if pattern is None or not pattern.search(message):
        text = frame.before + message + tail
        encoding = tokenizer(text, **options)
        return EncodedPrompt(
            [*leading, *encoding["input_ids"]], tokenizer, text, len(frame.before), encoding, len(leading)
        )
    head = [*leading, *encode(tokenizer, frame.before)]
    encoding = tokenizer(message, split_special_tokens=True, **options)
    ids = [*head, *encoding["input_ids"], *encode(tokenizer, tail)]
    return EncodedPrompt(ids, tokenizer, message, 0, encoding, len(head))


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
    text = apply_chat_template(
        tokenizer, [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(text).partition(MARK)
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
