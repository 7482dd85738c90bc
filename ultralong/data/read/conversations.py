"""Chat records of the public data sets, whatever their shape, to one form: a list of `{"role", "content"}`.

Three shapes cover them. `messages`: a list of turns with role and content (OpenAI's); an `answer` beside a list that
ends with the user is its last turn. `sharegpt`: a list of turns with from and value. `pairs`: a question and its answer
in fields of their own, perhaps with more input and a system prompt (Alpaca, and most of the mathematics and code sets
under other names). A record that is none of them, or lacks something, is an error whose message is short, for it
becomes a line in a report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
Style = Literal["auto", "messages", "sharegpt", "pairs"]
LISTS = ("messages", "conversations", "conversation")
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
ROLES = ("system", "user", "assistant", "tool")
QUESTIONS = ("instruction", "query", "question", "problem", "prompt")
ANSWERS = ("output", "response", "answer", "solution", "completion")
CONTEXTS = ("input", "context")
SYSTEMS = ("system_prompt", "system")


@dataclass(frozen=True)
class PairFields:
    """Names of the fields of a record in pairs, where they cannot be told by themselves.

    Attributes:
        question: The field that holds what the user says.
        answer: The field that holds the answer.
        context: A field that goes below the question, after an empty line, when it holds something.
        system: A field that holds the system message.
    """

    question: str
    answer: str
    context: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One conversation and where it is from.

    Attributes:
        id: Unique within the recipe and stable from run to run: sub-sampling depends on it.
        messages: Its turns.
        source: The source's name.
        license: The source's licence.
        category: What kind of skill it teaches, as the recipe says; sub-sampling counts by it.
    """

    id: str
    messages: list[Message]
    source: str = "local"
    license: str = "unknown"
    category: str = "general"

    @property
    def characters(self) -> int:
        """Characters of all its turns."""
        return sum(len(message["content"]) for message in self.messages)


def to_messages(record: Any, style: Style = "auto", pairs: PairFields | None = None) -> list[Message]:
    """The turns of a record.

    Args:
        record: A list of turns, or an object that holds a conversation in one of the known shapes.
        style: Which shape; "auto" finds out.
        pairs: Names of the fields of a record in pairs; given, the style is pairs.

    Returns:
        Turns with the roles system, user, assistant and tool, and nothing in them but role and content.

    Raises:
        ValueError: It is malformed; the message is the kind of defect.
    """
    if pairs is not None:
        style = "pairs"
    if isinstance(record, dict):
        held = next((record[name] for name in LISTS if isinstance(record.get(name), list)), None)
        if style == "pairs" or (style == "auto" and held is None):
            messages = _from_pairs(record, pairs)
        else:
            messages = _from_list(held, style)
            if messages[-1]["role"] == "user" and isinstance(record.get("answer"), str):
                messages.append({"role": "assistant", "content": record["answer"]})
    else:
        messages = _from_list(record, style)
    check_messages(messages)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question")
    if not all(is_unicode(message["content"]) for message in messages):
        raise ValueError("not valid Unicode")
    return messages


def check_messages(messages: Any, controls: tuple[str, ...] = ()) -> None:
    """Refuse a conversation that is malformed; the message is short, for it becomes a line in a report.

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
        if any(control in message["content"] for control in controls):
            raise ValueError("control token in the text")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no answer")


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


def _from_list(turns: Any, style: Style) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("no messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not an object")
        keys = ("from", "value") if style == "sharegpt" or (style == "auto" and "from" in turn) else ("role", "content")
        role, content = turn.get(keys[0]), turn.get(keys[1])
        if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
            raise ValueError("missing or unknown role")
        if not isinstance(content, str):
            raise ValueError("missing content")
        messages.append({"role": ROLE_NAMES[role.lower()], "content": content})
    return messages


def _from_pairs(record: dict[str, Any], pairs: PairFields | None) -> list[Message]:
    if pairs is None:
        key, answer_key, context_key, system_key = (
            next((key for key in keys if key in record), None) for keys in (QUESTIONS, ANSWERS, CONTEXTS, SYSTEMS)
        )
        if key is None and context_key is not None:
            key, context_key = context_key, None
        if key is None or answer_key is None:
            raise ValueError("no known fields")
        pairs = PairFields(key, answer_key, context_key, system_key)
    question, answer = record.get(pairs.question), record.get(pairs.answer)
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if not isinstance(answer, str):
        raise ValueError("missing content")
    context = record.get(pairs.context) if pairs.context else None
    if isinstance(context, str) and context.strip():
        question = f"{question}\n\n{context}"
    system = record.get(pairs.system) if pairs.system else None
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
