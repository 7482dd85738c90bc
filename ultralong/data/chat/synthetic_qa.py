"""Questions about a short passage of real text, as conversations: practice in answering from the window.

Two kinds. *Facts*: one to four invented sentences ("The number of harbour-lane is 48213.") stand somewhere in a
passage and are asked for, one turn each. *Quotes*: a few words of the passage are given and the words that follow are
asked for.

Everything fits in `max_tokens`, and that is the point: a model whose window is then extended has met such questions
only inside its old window, so what it does beyond comes from the extension and not from practice there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ultralong.data.chat.template import encode_chat
from ultralong.data.read.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIES = 20  # draws of a conversation that keeps its length
WORD = re.compile(r"\b[a-z]{3,9}\b")


@dataclass(frozen=True)
class FactWording:
    """How a fact is told and asked for: `{key}` and `{value}` are filled in."""

    opening: str
    fact: str
    question: str
    answer: str


WORDINGS = (
    FactWording(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.",
        "One of the special magic numbers for {key} is: {value}.",
        "What is the special magic number for {key} mentioned in the provided text?",
        "The special magic number for {key} mentioned in the provided text is {value}.",
    ),
    FactWording(
        "Read the text and remember the numbers in it.",
        "The number of {key} is {value}.",
        "What is the number of {key}?",
        "The number of {key} is {value}.",
    ),
    FactWording(
        "Here is a text.",
        "The pass key for {key} is {value}. Remember it.",
        "What is the pass key for {key}?",
        "The pass key for {key} is {value}.",
    ),
    FactWording("Here is a passage.", "(Note: {key} = {value})", "In the passage, what is {key}?", "{key} = {value}"),
    FactWording(
        "Remember this text.",
        "The secret code of the {key} is {value}.",
        "Tell me the secret code of the {key}.",
        "The secret code of the {key} is {value}.",
    ),
    FactWording(
        "A text follows.",
        "{key} was given the number {value}.",
        "Which number was given to {key}?",
        "{key} was given the number {value}.",
    ),
)


def synthetic_qa_conversations(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_tokens: int,
    seed: int = 0,
    quotes: float = 0.2,
    full: float = 0.6,
) -> Iterator[list[Message]]:
    """Make conversations about passages of `texts`, each at most `max_tokens` long under the chat template.

    Args:
        texts: Documents to cut passages from.
        tokenizer: With a chat template; it measures the length.
        count: How many conversations.
        max_tokens: Longest conversation, template included.
        seed: Names the stream; the same seed and texts give the same conversations.
        quotes: Share of conversations that ask for a quote, the rest ask for facts.
        full: Share of conversations that fill `max_tokens`; the others' lengths are uniform from a third of it.

    Yields:
        Messages of user and assistant in turn.

    Raises:
        ValueError: No text is long enough for a passage, or `max_tokens` leaves no room for one.
    """
    if max_tokens < 128:
        raise ValueError(f"max_tokens must be 128 or more to hold a question and a passage, found {max_tokens}.")
    # Characters per token are measured once; lengths are then corrected on each conversation.
    sample = " ".join(text[:2000] for text in texts[:20])
    ratio = len(sample) / max(1, len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))
    usable = [text for text in texts if len(text) > 2 * ratio * max_tokens]
    if not usable:
        raise ValueError(f"No text is longer than {2 * max_tokens} tokens, so there is nothing to cut passages from.")
    weights = [len(text) for text in usable]
    for number in range(count):
        draw = random.Random(f"{seed}:{number}")
        tokens = max_tokens if draw.random() < full else draw.randint(max_tokens // 3, max_tokens)
        text = draw.choices(usable, weights)[0]
        make = _quote if draw.random() < quotes else _facts
        key, tries = f"{seed}:{number}", range(TRIES)
        found = (
            _fitted(make, text, tokenizer, tokens, ratio, f"{key}:try{attempt}" if attempt else key, max_tokens)
            for attempt in tries
        )
        conversation = next((made for made in found if made), None)
        if conversation is None:
            raise ValueError(
                f"max_tokens is {max_tokens}, and of {TRIES} conversations none was that short, not even without its "
                "passage: questions about these texts are longer. Ask for more tokens."
            )
        yield conversation


def _fitted(
    make: Callable[[str, int, random.Random], list[Message]],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    ratio: float,
    key: str,
    longest: int,
) -> list[Message] | None:
    """Shorten the passage until the conversation fits, with the same draws; None where no passage is left to shorten.

    A conversation that misses its own length and keeps `longest` is taken: lengths below that are no promise.
    """
    characters = int(ratio * tokens)
    while True:
        conversation = make(text, max(0, characters), random.Random(key + ":text"))
        length = len(encode_chat(tokenizer, conversation)[0])
        if length <= tokens or (characters <= 0 and length <= longest):
            return conversation
        if characters <= 0:
            return None
        characters -= int(ratio * (length - tokens)) + 4


def _passage(text: str, characters: int, draw: random.Random) -> str:
    start = _word_start(text, int(draw.random() * max(1, len(text) - 2 * characters - 200)))
    end = start + characters
    while end < len(text) and characters and not text[end].isspace():
        end -= 1
    return text[start : max(start, end)]


def _word_start(text: str, place: int) -> int:
    """The start of the word that `place` falls into."""
    while 0 < place < len(text) and not text[place - 1].isspace():
        place -= 1
    return place


def _facts(text: str, characters: int, draw: random.Random) -> list[Message]:
    wording = draw.choice(WORDINGS)
    start = int(draw.random() * max(1, len(text) - 5000))
    words = WORD.findall(text[start : start + 5000]) or ["key"]
    keys: dict[str, str] = {}
    for _ in range(draw.choice((1, 2, 3, 4))):
        name = f"{draw.choice(words)}-{draw.choice(words)}" if draw.random() < 0.7 else draw.choice(words)
        keys[name] = str(draw.randint(10**6, 10**7 - 1) if draw.random() < 0.6 else draw.randint(10**4, 10**6 - 1))
    passage = _passage(text, characters, draw)
    # Some text in verse or code, some as one flowing paragraph; some answers start with a space, as in RULER's prompts.
    passage = " ".join(passage.split()) if draw.random() < 0.5 else passage
    lead = " " if draw.random() < 0.3 else ""
    # Cuts are placed in the untouched passage and filled from its end, so that no fact lands inside another.
    cuts = sorted(((_word_start(passage, int(draw.random() * len(passage))), key) for key in keys), reverse=True)
    for cut, key in cuts:
        passage = f"{passage[:cut]}{wording.fact.format(key=key, value=keys[key])} {passage[cut:]}"
    asked = list(keys)
    draw.shuffle(asked)
    messages: list[Message] = []
    for number, key in enumerate(asked):
        question = wording.question.format(key=key)
        opening = f"{wording.opening}\n{passage}\n" if number == 0 else ""
        messages.append({"role": "user", "content": opening + question})
        messages.append({"role": "assistant", "content": lead + wording.answer.format(key=key, value=keys[key])})
    return messages


def _quote(text: str, characters: int, draw: random.Random) -> list[Message]:
    passage = _passage(text, characters, draw)
    words = [match.span() for match in re.finditer(r"\S+", passage)]
    given, wanted = 5, draw.randint(8, 24)
    first = int(draw.random() * max(1, len(words) - given - wanted))
    cue, answer = words[first : first + given], words[first + given : first + given + wanted]
    if len(answer) < 2:  # too short a passage to quote from
        return _facts(text, characters, draw)
    quote = passage[cue[0][0] : cue[-1][1]]
    return [
        {"role": "user", "content": f"{passage}\nContinue this quote from the text: {quote}"},
        {"role": "assistant", "content": passage[answer[0][0] : answer[-1][1]]},
    ]
