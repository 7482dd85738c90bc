"""Conversations encoded, counted and, where a recipe says so, sub-sampled: what `chat` packs into rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.data.chat.subsample import HashSample, Subsample
from ultralong.data.chat.template import UnusableTemplate, encode_chat, turn_end
from ultralong.data.read.conversations import Conversation, to_messages
from ultralong.data.read.documents import ReadReport
from ultralong.data.read.messages import TRAIN, Message, is_learned, texts_of
from ultralong.data.select.length_rule import FU_CHARACTERS_PER_TOKEN, LengthCounts
from ultralong.data.tokens.encoding import token_dtype, vocabulary_of
from ultralong.utils.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPOSED = 4  # characters that Unicode's normal form C makes one of at most, as some tokenizers normalise first
EDGES = (256, 512, 1024, 2048, 4096, 8192)  # of examples, which are far shorter than documents


@dataclass(frozen=True)
class Example:
    """One encoded conversation.

    Attributes:
        number: Its place among the conversations.
        ids: (tokens,).
        mask: (tokens,) bool, what is to be learned.
        characters: Of its turns.
        conversation: Where it is from, with all turns.
    """

    number: int
    ids: np.ndarray
    mask: np.ndarray
    characters: int
    conversation: Conversation


@dataclass(frozen=True)
class EncodedConversations:
    """All examples that will be packed.

    Attributes:
        examples: In the order of reading.
        sha256: Over all their ids and masks.
        sources: For every source: examples (as `documents`), tokens, tokens with a loss, characters, tokens by licence;
            lengths of conversations as read and as taken (at 3.68 characters a token, as those left out are not
            encoded), each once however many examples it becomes.
        subsampled: For every category: conversations seen, wanted, taken; None without sub-sampling.
    """

    examples: list[Example]
    sha256: str
    sources: dict[str, dict[str, Any]]
    subsampled: dict[str, dict[str, int]] | None


def encode_conversations(
    conversations: Iterable[Conversation | list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    report: ReadReport,
    seed: int,
    subsample: Subsample | None = None,
    quiet: bool = False,
    each_answer: bool = False,
) -> EncodedConversations:
    """Encode what can be encoded and choose among it.

    Args:
        conversations: As for `pack_chat`.
        tokenizer: Has the chat template.
        limit: Longer examples are left out and counted.
        report: Where counts go.
        seed: Decides on sub-sampling.
        subsample: How many are taken; None takes all.
        quiet: True shows no progress bar.
        each_answer: True makes an example of every answer, see `ChatSettings`.

    Raises:
        ValueError: The tokenizer has no template, a category has no share, or nothing is left.
    """
    chosen: HashSample[list[Example]] | None = None if subsample is None else HashSample(subsample, seed)
    lengths: dict[str, LengthCounts] = {}
    examples: list[Example] = []
    dtype = token_dtype(vocabulary_of(tokenizer))
    check_template(tokenizer)
    most = limit * COMPOSED * max(map(len, tokenizer.get_vocab()))
    for number, item in enumerate(progress(conversations, desc="chat", unit="conversation", quiet=quiet)):
        talk = item if isinstance(item, Conversation) else _conversation(item, number, report)
        if talk is None:
            continue
        if isinstance(item, Conversation):
            lengths.setdefault(talk.source, LengthCounts(EDGES)).add(talk.characters / FU_CHARACTERS_PER_TOKEN, 0)
        if chosen is not None and not chosen.wanted(talk.id, talk.category):
            continue
        # One with no answer to learn is tried as it is, which says why it is left out.
        parts = (each_alone(talk) or [talk]) if each_answer else [talk]
        made = [
            replace(one, conversation=talk)
            for part in parts
            if (one := _encode(part, number, tokenizer, limit, most, report, dtype)) is not None
        ]
        if not made:
            continue
        if chosen is not None:
            chosen.add(talk.id, talk.category, number, made)
        else:
            examples += made
    if chosen is not None:
        examples = [example for made in chosen.taken() for example in made]
    if not examples:
        why = "; ".join(
            f"{reason} ({count:,}, such as {report.examples[reason][0]})" for reason, count in report.skipped.items()
        )
        raise ValueError(f"no conversation could be used: {why or 'there was none'}")
    return EncodedConversations(
        examples, _digest(examples), _count(examples, lengths, report), None if chosen is None else chosen.as_json()
    )


def each_alone(talk: Conversation) -> list[Conversation]:
    """A conversation for each answer that is to be learned: the turns up to it, of which it alone is learned."""
    return [
        replace(talk, messages=[*(_unlearned(turn) for turn in talk.messages[:place]), message])
        for place, message in enumerate(talk.messages)
        if is_learned(message)
    ]


def _unlearned(message: Message) -> Message:
    return {**message, TRAIN: False} if message["role"] == "assistant" else message


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with which no conversation at all can be encoded, before any is read.

    Raises:
        ValueError: There is no chat template, or one under which answers have no end.
    """
    if tokenizer.chat_template is None:
        raise UnusableTemplate("the tokenizer has no chat template. Set one, or use a tokenizer that has one.")
    turn_end(tokenizer, tokenizer.get_chat_template())


def _conversation(messages: Any, number: int, report: ReadReport) -> Conversation | None:
    """A plain list of messages, brought to one form as a file's records are."""
    id, unused = f"conversation {number}", set[str]()
    try:
        talk = Conversation(id, to_messages(messages, unused=unused))
    except ValueError as error:
        report.skip(str(error), id)
        return None
    report.unused.update(unused)
    return talk


def _encode(
    talk: Conversation,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    most: int,
    report: ReadReport,
    dtype: np.dtype,
) -> Example | None:
    if sum(len(text.strip()) for message in talk.messages for text in texts_of(message)) > most:
        # Ten million characters take minutes to render and to encode, and cannot fit: no token is that long.
        report.skip(f"longer than {limit} tokens by its characters alone", talk.id)
        return None
    try:
        ids, mask = encode_chat(tokenizer, talk.messages)
    except UnusableTemplate:
        raise
    except ValueError as error:
        report.skip(str(error), talk.id)
        return None
    if len(ids) > limit:
        report.skip(f"longer than {limit} tokens", f"{talk.id} ({len(ids)} tokens)")
        return None
    return Example(number, np.array(ids, dtype), np.array(mask, dtype=bool), talk.characters, talk)


def _digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.number.to_bytes(8, "little") + example.ids.size.to_bytes(8, "little"))
        digest.update(example.ids.data)
        digest.update(example.mask.data)
    return digest.hexdigest()


def _count(examples: list[Example], lengths: dict[str, LengthCounts], report: ReadReport) -> dict[str, dict[str, Any]]:
    """What was taken of each source; the report counts it too."""
    names = sorted({*lengths, *(example.conversation.source for example in examples)})
    counted = ("documents", "tokens", "target_tokens", "characters")
    sources: dict[str, dict[str, Any]] = {name: {**dict.fromkeys(counted, 0), "licenses": {}} for name in names}
    taken: set[int] = set()  # conversations, each of which may be many examples
    for example in examples:
        talk, tokens = example.conversation, int(example.ids.size)
        report.documents += 1
        report.characters += example.characters
        row = sources[talk.source]
        row["documents"] += 1
        row["tokens"] += tokens
        row["target_tokens"] += int(example.mask[1:].sum())
        row["characters"] += example.characters
        row["licenses"][talk.license] = row["licenses"].get(talk.license, 0) + tokens
        counts = lengths.get(talk.source)
        if counts is not None and example.number not in taken:
            taken.add(example.number)
            counts.add(talk.characters / FU_CHARACTERS_PER_TOKEN, 1, read=0)
    for name, counts in lengths.items():
        sources[name]["lengths"] = counts.as_json()
    return sources
