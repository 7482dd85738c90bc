"""What a test is: how to make a prompt of some size, how many tokens to answer in, how to score the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.prompts import Frame


@dataclass(frozen=True)
class Draft:
    """A prompt before it is framed and measured.

    Attributes:
        input: The user's message.
        answer_prefix: Start of the answer, put in the model's mouth.
        outputs: Reference answers.
        gold: Places in `input` (characters) of what the answer rests on; empty where it rests on everything.
        depth: Where that stands in the context, from 0 to 1, when the test places it on purpose.
        max_new_tokens: Tokens to answer in, where it is not the same for every prompt of the test.
    """

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...] = ()
    depth: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Setting:
    """What a test is made under.

    Attributes:
        tokenizer: Lengths are counted with it.
        length: Most tokens of prompt and answer together.
        frame: What stands around the user's message.
        chat: Whether the frame is a chat template.
        haystack: The caller's own text to hide things in; None takes the test's.
        questions: File of questions and documents, for tests on published data.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    frame: Frame
    chat: bool
    haystack: Sequence[str] | None = None
    questions: Path | None = None


class Builder(Protocol):
    """Makes prompts of one test under one setting.

    Attributes:
        source: What the text is made from, for reports.
        smallest: The smallest size.
        probe: How much larger a second prompt is made to learn what a unit of size costs in tokens.
    """

    source: str
    smallest: int
    probe: int

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A prompt of `size` units (lines, words, pairs: the test's own); `index` is the sample's number."""
        ...


@dataclass(frozen=True)
class Task:
    """One test.

    Attributes:
        name: As in lm-eval.
        max_new_tokens: Tokens to answer in.
        prepare: From a setting to a builder.
        score: From an answer and the references to a score from 0 to 1.
    """

    name: str
    max_new_tokens: int
    prepare: Callable[[Setting], Builder]
    score: Callable[[str, Sequence[str]], float]
