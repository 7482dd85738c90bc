"""RULER's two aggregation tests: the most common words of a list, the most frequent coded words of a text."""

from __future__ import annotations

import functools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultralong.evaluation.tasks.ruler.niah import SHUFFLE_SEED
from ultralong.evaluation.tasks.task import Draft, Setting
from ultralong.evaluation.tasks.texts import made_up_words, word_lists

COMMON_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON_COUNT = 10
SHORT_LENGTH = 4096  # below it NVIDIA repeats words less often
# Most words that the tokens of a prompt can pay for: three entries of a number, a dot and a word, six tokens each.
TOKENS_PER_WORD = 18

CODED_TASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the "
    "dots '....'. What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_LETTERS = 6
CODED_ANSWER_TOKENS = 50
TOKENS_PER_CODE = 50
ZETA_2 = math.pi**2 / 6
ALPHA = 2.0


@functools.cache
def common_words() -> tuple[str, ...]:
    """RULER's nouns, adjectives and verbs, each once, in NVIDIA's order."""
    lists = word_lists()
    words = sorted({*lists.nouns, *lists.adjectives, *lists.verbs})
    random.Random(SHUFFLE_SEED).shuffle(words)
    return tuple(words)


@dataclass(frozen=True)
class CommonBuilder:
    """Makes word lists with one worked example; a unit of size is a different word."""

    words: Sequence[str]
    source: str
    short: bool
    smallest: int = COMMON_COUNT + 5
    probe: int = 100

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A list of `size` different words, ten of them ten times as common as the rest (six times in short lists)."""
        example, answers = _word_list(draw, self.words, *((20, 3, 1) if self.short else (40, 10, 3)))
        context, common = _word_list(draw, self.words, size, *((6, 1) if self.short else (30, 3)))
        numbered = " ".join(f"{place}. {word}" for place, word in enumerate(answers, 1))
        shown = f"{COMMON_TASK.format(context=example)}{COMMON_PREFIX} {numbered}\n"
        return Draft(shown + COMMON_TASK.format(context=context), COMMON_PREFIX, tuple(common))


def _word_list(draw: random.Random, words: Sequence[str], size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    chosen = draw.sample(words, min(size, len(words)))
    common, rest = chosen[:COMMON_COUNT], chosen[COMMON_COUNT:]
    entries = common * often + rest * seldom
    random.Random(SHUFFLE_SEED).shuffle(entries)
    return " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1)), common


def prepare_common(setting: Setting) -> CommonBuilder:
    """The builder, with made-up words once the length can hold more than RULER's list has."""
    words = common_words()
    short = setting.length < SHORT_LENGTH
    probe = CommonBuilder(words, "", short).build(random.Random(0), len(words) // 4, 0)
    tokens = len(setting.tokenizer(probe.input, add_special_tokens=False, verbose=False)["input_ids"])
    # The whole list takes four times as much as this quarter of it; a margin leaves the size free to be corrected.
    if setting.length < 3.7 * tokens:
        return CommonBuilder(words, "wonderwords", short)
    most = max(len(words), setting.length // (TOKENS_PER_WORD // 3))
    return CommonBuilder(made_up_words(most), "made-up words", short)


@dataclass(frozen=True)
class CodedBuilder:
    """Makes coded texts whose words follow a zeta law; a unit of size is a word of the text.

    Attributes:
        vocabulary: Different coded words drawn, most of which are too rare to appear.
    """

    vocabulary: int
    source: str = "coded words"
    smallest: int = 100
    probe: int = 400

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """About `size` words: rank k takes `size / (k**2 zeta(2))` of them, and rank 1 is the dots to be ignored."""
        words = ["".join(draw.choices(string.ascii_lowercase, k=CODED_LETTERS)) for _ in range(self.vocabulary)]
        known = set(words)
        while len(known) < self.vocabulary:
            words.append("".join(draw.choices(string.ascii_lowercase, k=CODED_LETTERS)))
            known.add(words[-1])
        words = sorted(known)
        random.Random(SHUFFLE_SEED).shuffle(words)
        words[0] = "..."
        counts = (size * np.arange(1, len(words) + 1) ** -ALPHA / ZETA_2).astype(int)
        text = [word for word, count in zip(words, counts.tolist(), strict=True) for _ in range(count)]
        random.Random(SHUFFLE_SEED).shuffle(text)
        return Draft(CODED_TASK.format(context=" ".join(text)), CODED_PREFIX, tuple(words[1:4]))


def prepare_coded(setting: Setting) -> CodedBuilder:
    """The builder; the vocabulary grows with the length, as NVIDIA's does."""
    return CodedBuilder(max(8, (setting.length - CODED_ANSWER_TOKENS) // TOKENS_PER_CODE))
