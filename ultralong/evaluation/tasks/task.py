"""What a test is: how to make a prompt of some size, how many tokens to answer in, how to score the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.prompts import Frame

# By what a caller names published data; a study has a key in its place (`ablation.configs.evaluation_keys`).
DATA_OPTIONS = "--data FOLDER (eval run) or --questions FILE (eval make)"
# RULER's four categories (Hsieh et al. 2024, section 3) and what the tests of 2026 ask for beside them.
CAPABILITIES = (
    "retrieval",
    "multi-hop",
    "aggregation",
    "co-reference",
    "question answering",
    "reasoning",
    "summarisation",
)


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
        extra: Further fields of the sample's record.
    """

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...] = ()
    depth: float | None = None
    max_new_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a test is made under.

    Attributes:
        tokenizer: Lengths are counted with it.
        length: Most tokens of prompt and answer together.
        frame: What stands around the user's message.
        chat: Whether the frame is a chat template.
        haystack: The caller's own text to hide things in; None takes the test's.
        questions: File of questions and documents, or a folder of them, for tests on published data.
        above: For a file of own questions: it gives only those of more tokens than this, as a shorter length has the
            others. None gives all, and one too long is an error.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    frame: Frame
    chat: bool
    haystack: Sequence[str] | None = None
    questions: Path | None = None
    above: int | None = None


class Builder(Protocol):
    """Makes prompts of one test under one setting."""

    @property
    def source(self) -> str:
        """What the text is made from, for reports."""
        ...

    @property
    def smallest(self) -> int:
        """The smallest size."""
        ...

    @property
    def probe(self) -> int:
        """How much larger a second prompt is made to learn what a unit of size costs in tokens."""
        ...

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A prompt of `size` units (lines, words, pairs: the test's own); `index` is the sample's number."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Makes prompts of one test whose texts are published and have the length that they have."""

    @property
    def source(self) -> str:
        """What the text is, for reports."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def draft(self, seed: int, index: int) -> Draft:
        """Sample `index` at its full length."""
        ...


@dataclass(frozen=True)
class Task:
    """One test.

    Attributes:
        name: As in lm-eval.
        max_new_tokens: Tokens to answer in.
        prepare: From a setting to a builder, or to a reader of published texts.
        score: From an answer and the references to a score from 0 to 1.
        extra: Further fields of a record that `score` takes, by name.
        former_name: Its name in version 0.3, where that was another one.
        needs: Package that `score` imports, where it is an optional one.
        capability: What of a long context it asks for, one of `CAPABILITIES`; reports average by it.
    """

    name: str
    max_new_tokens: int
    prepare: Callable[[Setting], Builder | Reader]
    score: Callable[..., float]
    extra: tuple[str, ...] = ()
    former_name: str = ""
    needs: str = ""
    capability: str = "retrieval"

    def __post_init__(self) -> None:
        if self.capability not in CAPABILITIES:
            raise ValueError(f"{self.capability!r} is none of the capabilities {', '.join(CAPABILITIES)}.")

    @property
    def seed_name(self) -> str:
        """The name that seeds the draws: a renamed test still gives the samples that it gave."""
        return self.former_name or self.name

    def grade(self, record: Mapping[str, Any]) -> float:
        """The score of a record with `prediction` and `outputs`, from 0 to 1."""
        return self.score(record["prediction"], record["outputs"], **{name: record.get(name) for name in self.extra})
