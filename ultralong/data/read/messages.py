"""The one form of a conversation: a list of messages, each with a role and a content.

Two more keys may stand in an answer. `reasoning_content` is what the model thinks before it; a chat template decides
where that is written. `train` says whether the answer is learned; without it, it is.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
REASONING = "reasoning_content"
TRAIN = "train"
KEYS = {"role", "content", REASONING, TRAIN}


def check_messages(messages: Any, controls: tuple[str, ...] = ()) -> None:
    """Refuse a conversation that is malformed; the message is short, as it becomes a line of a report.

    Args:
        messages: The conversation.
        controls: Texts of control tokens, which no message may hold.

    Raises:
        ValueError: What is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError("missing or unknown role")
        if not isinstance(message.get("content"), str):
            raise ValueError("missing content")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError("empty answer")
        if message["role"] == "user" and not message["content"].strip():
            raise ValueError("empty question")
        foreign = sorted(map(str, message.keys() - KEYS))
        if foreign:
            raise ValueError(f"unknown key {', '.join(foreign)} in a message")
        if any(control in text for control in controls for text in texts_of(message)):
            raise ValueError("control token in the text")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no answer")
    if not any(is_learned(message) for message in answers):
        raise ValueError("no answer to be learned")


def is_learned(message: Message) -> bool:
    """Whether a message is an answer that the model is to learn."""
    return message["role"] == "assistant" and message.get(TRAIN) is not False


def texts_of(message: Message) -> list[str]:
    """The texts of a message: its reasoning, where it has one, and its content."""
    return [*([message[REASONING]] if REASONING in message else []), message["content"]]


def plain_text(content: Any) -> str:
    """A content: a text, or a list of parts that are all texts (OpenAI's long form)."""
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise ValueError("a content that is not all text")
    if not isinstance(content, str):
        raise ValueError("missing content")
    return content


def from_first_question(messages: list[Message]) -> list[Message]:
    """The turns without answers that come before the first question, as in conversations that were cut in pieces.

    Nothing asked for such an answer, and a template cannot render the empty prompt before it. FastChat, which made the
    first models out of ShareGPT, leaves them out as well.
    """
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    return [*(message for message in messages[:first] if message["role"] == "system"), *messages[first:]]


def is_unicode(text: str) -> bool:
    """False for a text with half a surrogate pair, which JSON can spell and no tokenizer can read."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_null(value: Any) -> bool:
    """No value; pandas writes NaN for it."""
    return value is None or (isinstance(value, float) and value != value)


def is_empty(value: Any) -> bool:
    """Nothing, spelled in any of the ways that tables spell it."""
    return is_null(value) or value in ([], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))
