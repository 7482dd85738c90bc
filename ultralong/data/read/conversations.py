"""Chat records of the public data sets, whatever their shape, to one form: a list of messages (see `messages`).

Three shapes cover them. `messages`: a list of turns with role and content (OpenAI's); an `answer` beside a list that
ends with the user is its last turn. `sharegpt`: a list of turns with from and value. `pairs`: a question and its answer
in fields of their own, perhaps with more input, a system prompt and a history (Alpaca, and most of the mathematics and
code sets under other names). A field that is null or NaN is as good as absent, as tables give records all fields.

Nothing vanishes without a word. A record that is none of these shapes, lacks something, or holds what would change the
meaning of the rest and cannot be packed (tool calls, images) is an error whose message is short, as it becomes a line
in a report. Names of fields that were simply not used are handed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any, Literal

from ultralong.data.read.messages import (
    REASONING,
    TRAIN,
    Message,
    check_messages,
    is_empty,
    is_null,
    is_unicode,
    plain_text,
    texts_of,
)

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
QUESTIONS = ("instruction", "query", "question", "problem", "prompt")
ANSWERS = ("output", "response", "answer", "solution", "completion")
CONTEXTS = ("input", "context")
SYSTEMS = ("system_prompt", "system", "system_message")
REASONINGS = (REASONING, "thinking", "reasoning", "thought")
# Of a turn: whether it is learned, as axolotl, OpenAI, ms-swift and verl spell it.
LEARNED = (TRAIN, "weight", "loss", "loss_mask")
# What cannot be packed and changes what the rest means, of a record or of a turn; the reason that reports give.
REFUSED = {
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool calls"),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "images, sound or video"),
    "documents": "documents beside the conversation",
    **dict.fromkeys(("mask", "loss_scale", "train_detail", "train_on_input"), "a loss of its own for parts of a text"),
}


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
        return sum(len(text) for message in self.messages for text in texts_of(message))


def to_messages(
    record: Any, style: Style = "auto", pairs: PairFields | None = None, unused: set[str] | None = None
) -> list[Message]:
    """The turns of a record.

    Args:
        record: A list of turns, or an object that holds a conversation in one of the known shapes.
        style: Which shape; "auto" finds out.
        pairs: Names of the fields of a record in pairs; given, the style is pairs.
        unused: Names of fields that were not used are added here, a turn's behind a dot.

    Returns:
        Turns with the roles system, user, assistant and tool; see `messages` for their keys.

    Raises:
        ValueError: It is malformed; the message is the kind of defect.
    """
    left = unused if unused is not None else set()
    if isinstance(record, dict):
        fields = {key: value for key, value in record.items() if not is_null(value)}
        _refuse(fields)
        _refuse_unlearned(fields)
        messages = _from_record(fields, record, "pairs" if pairs is not None else style, pairs, left)
    else:
        messages = _from_list(record, style, left)
    check_messages(messages)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question")
    if not all(is_unicode(text) for message in messages for text in texts_of(message)):
        raise ValueError("not valid Unicode")
    return messages


def _from_record(
    fields: dict[str, Any], record: dict[str, Any], style: Style, pairs: PairFields | None, unused: set[str]
) -> list[Message]:
    """Turns of a record; `fields` is it without what is null."""
    lists = [name for name in LISTS if isinstance(fields.get(name), list)]
    name = next((name for name in lists if fields[name]), lists[0] if lists else None)
    paired = style == "auto" and (name is None or (not fields[name] and _found(fields, QUESTIONS) is not None))
    if style == "pairs" or paired:
        return _from_pairs(fields, record, pairs, unused)
    messages, used = _from_list(None if name is None else fields[name], style, unused), {name}
    system = _found(fields, SYSTEMS)
    if system is not None:
        used.add(system)
        messages = _with_system(messages, fields[system])
    if messages[-1]["role"] == "user" and isinstance(fields.get("answer"), str):
        messages.append({"role": "assistant", "content": fields["answer"]})
        used.add("answer")
    unused |= _left(fields, used)
    return messages


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """The turns with the system message that stands beside them in the record."""
    if not isinstance(system, str):
        raise ValueError("a system message that is no text")
    held = [message["content"] for message in messages if message["role"] == "system"]
    if not system.strip() or system in held:
        return messages
    if held:
        raise ValueError("two system messages that differ")
    return [{"role": "system", "content": system}, *messages]


def _from_list(turns: Any, style: Style, unused: set[str]) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("no messages")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not an object")
        fields = {key: value for key, value in turn.items() if not is_null(value)}
        sharegpt = style == "sharegpt" or (style == "auto" and "from" in fields)
        keys = ("from", "value") if sharegpt else ("role", "content")
        role = fields.get(keys[0])
        if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
            raise ValueError("missing or unknown role")
        _refuse(fields)
        message: Message = {"role": ROLE_NAMES[role.lower()], "content": plain_text(fields.get(keys[1]))}
        used = {*keys, *_add_reasoning(message, fields), *_add_learned(message, fields)}
        unused |= {f"{'conversations' if sharegpt else 'messages'}.{key}" for key in _left(fields, used)}
        messages.append(message)
    return messages


def _add_reasoning(message: Message, fields: dict[str, Any]) -> Iterable[str]:
    """Keep what an assistant thought before its answer; the names of the fields that were used."""
    found = [key for key in REASONINGS if not is_empty(fields.get(key))]
    if not found:
        return [key for key in REASONINGS if key in fields]
    if message["role"] != "assistant":
        raise ValueError("reasoning in a turn that is not the assistant's")
    if not isinstance(fields[found[0]], str) or any(fields[key] != fields[found[0]] for key in found):
        raise ValueError("reasoning that is no text, or two that differ")
    message[REASONING] = fields[found[0]]
    return found


def _add_learned(message: Message, fields: dict[str, Any]) -> Iterable[str]:
    """Note whether a turn is learned, where it says so; the names of the fields that were used."""
    found = [key for key in LEARNED if key in fields]
    values = {fields[key] if isinstance(fields[key], bool | int | float) else None for key in found}
    if not values <= {0, 1}:
        raise ValueError("a weight of a turn that is neither 0 nor 1")
    if len(values) == 2:
        raise ValueError("a turn that is learned and not learned")
    if message["role"] == "assistant" and values == {0}:
        message[TRAIN] = False
    if message["role"] != "assistant" and values == {1} and found != ["weight"]:
        raise ValueError("a loss on a turn that is not the assistant's")
    return found


def _from_pairs(
    fields: dict[str, Any], record: dict[str, Any], pairs: PairFields | None, unused: set[str]
) -> list[Message]:
    # Fields that a recipe names are all that it wants.
    thoughts = () if pairs is not None else REASONINGS
    pairs = pairs or _pair_fields(fields, record)
    question, answer = fields.get(pairs.question), fields.get(pairs.answer)
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if not isinstance(answer, str):
        raise ValueError("missing content")
    context = fields.get(pairs.context) if pairs.context else None
    if not isinstance(context, str | None) and not is_empty(context):
        raise ValueError("a context that is no text")  # passages in a list: the question would stand without them
    if isinstance(context, str) and context.strip():
        question = f"{question}\n\n{context}"
    message: Message = {"role": "assistant", "content": answer}
    thought = _add_reasoning(message, {key: fields[key] for key in thoughts if key in fields})
    used = {pairs.question, pairs.answer, pairs.context, pairs.system, "history", *thought}
    unused |= _left(fields, used)
    messages = [*_history(fields.get("history")), {"role": "user", "content": question}, message]
    system = fields.get(pairs.system) if pairs.system else None
    return messages if system is None else _with_system(messages, system)


def _pair_fields(fields: dict[str, Any], record: dict[str, Any]) -> PairFields:
    """Which fields hold question, answer, context and system message."""
    keys = [_found(fields, names) for names in (QUESTIONS, ANSWERS, CONTEXTS, SYSTEMS)]
    question, answer, context, system = keys
    if question is None and context is not None:
        question, context = context, None
    asked = question is not None or any(name in record for name in QUESTIONS)
    if not asked or not (answer or any(name in record for name in ANSWERS)):
        raise ValueError("no known fields")
    if question is None:
        raise ValueError("no question")
    if answer is None:
        raise ValueError("missing content")
    return PairFields(question, answer, context, system)


def _history(history: Any) -> list[Message]:
    """Earlier questions and answers, as Alpaca's `history` holds them: a list of pairs."""
    if is_empty(history):
        return []
    messages: list[Message] = []
    for pair in history if isinstance(history, list) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("a history that is not pairs of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _found(fields: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of the names whose field holds something, or else the first that is there at all."""
    there = [name for name in names if name in fields]
    return next((name for name in there if not is_empty(fields[name])), there[0] if there else None)


def _refuse(fields: dict[str, Any]) -> None:
    """Refuse what cannot be packed and changes what the rest of a record or turn means."""
    for key, what in REFUSED.items():
        if not is_empty(fields.get(key)):
            raise ValueError(f"holds {what}")


def _refuse_unlearned(fields: dict[str, Any]) -> None:
    """Leave out a record that says so; a weight of its own would count it otherwise than the rest."""
    for key in LEARNED:
        value = fields.get(key)
        if isinstance(value, bool | int | float) and (value == 0 or (key == "weight" and value != 1)):
            raise ValueError("says that it is not learned" if value == 0 else "a weight of a record that is not 1")


def _left(fields: dict[str, Any], used: Set[str | None]) -> set[str]:
    """Names of fields that hold something and were not used."""
    return {key for key in fields.keys() - used if not is_empty(fields[key])}
