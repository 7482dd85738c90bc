"""Needle in a haystack: a number hidden in a long text, asked for at its end; as ids of an exact length, and as text.

A prompt of ids is exactly as long as asked, for any tokenizer, because it is put together from ids: the frame, haystack
up to the needle, the needle, haystack that fills what is left, the question. Wording and scoring follow RULER's
`niah_single` tasks (Hsieh et al. 2024).

T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.haystack import NOISE_LINE, Haystack, sentence_lead
from ultralong.evaluation.tasks.prompts import encode, encode_continuation, encode_texts, make_frame
from ultralong.evaluation.tasks.scoring import first_integer
from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import Essays

# fmt: off
KEYS = (
    "amber", "anchor", "basket", "birch", "candle", "cedar", "compass", "copper", "cradle", "ember", "falcon",
    "feather", "garden", "granite", "harbor", "hazel", "island", "ivory", "kettle", "lantern", "linen", "maple",
    "marble", "meadow", "mirror", "nectar", "orchard", "otter", "pebble", "pepper", "quartz", "quiver", "raven",
    "ribbon", "saddle", "silver", "thimble", "timber", "velvet", "walnut", "willow", "window",
)
# fmt: on
MOST_DIGITS = 18
DRAWS = 1000
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class NeedleFormat:
    """The words of the test. Defaults: RULER's, for one number under one key.

    Attributes:
        prompt: The user's message, with `{context}` once and `{key}` where the key is named.
        needle: The hidden sentence, with `{value}` and, if the question names it, `{key}`.
        answer_prefix: Start of the answer, put in the model's mouth, so that the number comes next.
        digits: Digits of the number; the first is never 0.
        keys: Words that keys are drawn from.
    """

    prompt: str = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n{context}\n"
        "What is the special magic number for {key} mentioned in the provided text?"
    )
    needle: str = "One of the special magic numbers for {key} is: {value}."
    answer_prefix: str = " The special magic number for {key} mentioned in the provided text is"
    digits: int = 7
    keys: tuple[str, ...] = KEYS

    def __post_init__(self) -> None:
        if self.prompt.count("{context}") != 1:
            raise ValueError("A needle prompt must hold {context} exactly once: it marks where the haystack goes.")
        if self.needle.count("{value}") < 1:
            raise ValueError("A needle must hold {value}: it is what the model is asked for.")
        if not 1 <= self.digits <= MOST_DIGITS:
            raise ValueError(f"A needle's number has 1 to {MOST_DIGITS} digits, got {self.digits}.")
        if not self.keys:
            raise ValueError("A needle format needs at least one key.")


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """One prompt with its answer.

    Attributes:
        input_ids: (T,) int32 ids of the prompt, answer prefix included.
        answer_ids: Ids of the answer that follow it; prompt and answer together are `length` long.
        answer: The number, as text.
        key: The key it is asked under.
        depth: Where it was meant to stand, 0 first and 1 last.
        length: Tokens of prompt and answer.
        position: Index of the needle's first token in `input_ids`.
    """

    input_ids: np.ndarray
    answer_ids: tuple[int, ...]
    answer: str
    key: str
    depth: float
    length: int
    position: int


def prepare_haystack(
    tokenizer: PreTrainedTokenizerBase, haystack: Haystack | str | Sequence[str] | None, length: int
) -> Haystack:
    """A tokenised haystack from what a caller may give.

    Args:
        tokenizer: Any tokenizer.
        haystack: Tokenised already, a text, documents, or None for repeated noise.
        length: Longest prompt; twice as many tokens are read, so that samples can start at different places.
    """
    if isinstance(haystack, Haystack):
        return haystack
    return Haystack.noise(tokenizer) if haystack is None else Haystack.from_texts(tokenizer, haystack, limit=2 * length)


def make_needle(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    seed: int,
    haystack: Haystack | str | Sequence[str] | None = None,
    *,
    sample: int = 0,
    form: NeedleFormat | None = None,
    chat: bool | None = None,
) -> NeedleSample:
    """Make one needle prompt. The same arguments give the same prompt, whatever was made before.

    Args:
        tokenizer: Any tokenizer. With a chat template the prompt is a user's turn and the answer the assistant's.
        length: Tokens of prompt and answer together, exactly.
        depth: Where in the haystack the needle stands: 0 before it, 1 behind it, at the nearest end of a sentence.
        seed: Seed of the number, the key and the place in the haystack.
        haystack: A prepared `Haystack` (best for many samples), a text, documents, or None for repeated noise.
        sample: Number of the sample under this seed, length and depth.
        form: The words; None takes RULER's.
        chat: True takes the chat template, False none; None takes it where there is one.

    Raises:
        ValueError: A depth outside [0, 1], a length too short for the words alone, or a haystack whose text holds so
            many numbers that none is left to hide.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is a fraction from 0 (first) to 1 (last), got {depth}.")
    form = NeedleFormat() if form is None else form
    haystack = prepare_haystack(tokenizer, haystack, length)
    draw = random.Random(f"needle {seed} {length} {depth:.9f} {sample}")
    key, answer = draw.choice(form.keys), _draw_number(draw, form.digits, haystack.numbers)
    frame, lead = make_frame(tokenizer, chat), sentence_lead(tokenizer)
    opening, closing = form.prompt.replace("{key}", key).split("{context}")
    head = [*frame.leading, *encode(tokenizer, frame.before + opening)]
    (needle,) = encode_texts(tokenizer, [lead + form.needle.replace("{key}", key).replace("{value}", answer)])
    tail, answer_ids = encode_continuation(
        tokenizer, closing + frame.after + form.answer_prefix.replace("{key}", key), " " + answer
    )
    room = length - len(head) - len(needle) - len(tail) - len(answer_ids)
    if room < 0:
        raise ValueError(
            f"A needle prompt of {length} tokens is too short: with this tokenizer the words alone take "
            f"{length - room}. Ask for at least that (a needle map has as many lengths as --grid says, or those of "
            "--needle-lengths), or shorten the wording."
        )
    start = int(haystack.starts[draw.randrange(len(haystack.starts))])
    cut = haystack.nearest_cut(start, round(depth * room), room)
    hay = haystack.take(start, room)
    input_ids = np.concatenate(
        [np.asarray(head, np.int32), hay[:cut], np.asarray(needle, np.int32), hay[cut:], np.asarray(tail, np.int32)]
    )
    return NeedleSample(input_ids, tuple(answer_ids), answer, key, depth, length, len(head) + cut)


def _draw_number(draw: random.Random, digits: int, taken: frozenset[str]) -> str:
    """A number of so many digits that the haystack does not hold."""
    for _ in range(DRAWS):
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        if number not in taken:
            return number
    raise ValueError(f"The haystack holds nearly every number of {digits} digits: hide a longer one.")


@dataclass(frozen=True)
class NeedleBuilder:
    """One number in running text; a unit of size is a word."""

    text: Essays
    form: NeedleFormat
    smallest: int = 20
    probe: int = 2000

    @property
    def source(self) -> str:
        """What the text is."""
        return self.text.name

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Depths follow the golden ratio, so that any number of samples in a row covers them evenly."""
        form, depth = self.form, index * GOLDEN % 1.0
        key = draw.choice(form.keys)
        value = str(draw.randrange(10 ** (form.digits - 1), 10**form.digits))
        sentences = self.text.sentences(size)
        cut = round(depth * len(sentences))
        needle = form.needle.replace("{key}", key).replace("{value}", value)
        context = " ".join([*sentences[:cut], needle, *sentences[cut:]])
        message = form.prompt.replace("{key}", key).replace("{context}", context)
        return Draft(message, form.answer_prefix.replace("{key}", key), (value,), (message.index(needle),), depth)


def prepare(setting: Setting) -> NeedleBuilder:
    """The builder, over the caller's documents or repeated noise."""
    text = (
        Essays([NOISE_LINE], "repeated noise")
        if setting.haystack is None
        else Essays(setting.haystack, "documents given")
    )
    return NeedleBuilder(text, NeedleFormat())


NEEDLE_TASK = Task("needle", 16, prepare, first_integer)
