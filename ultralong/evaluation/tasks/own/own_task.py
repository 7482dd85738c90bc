"""A test that is a file of your own questions, one JSON object a line: checked, pinned, laid out over a run's lengths.

Such a test is named by the file's path, and called `own_STEM` in answers and reports. A question belongs to the
smallest length of the run that holds it, with its context whole and its answer. A file's digest (SHA-256 of its bytes,
and of the files of contexts that it names) goes into the run's settings and every sample.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.own.question_file import MOST_TOLD, Questions, read_questions
from ultralong.evaluation.tasks.prompts import encode_prompt, make_frame
from ultralong.evaluation.tasks.published.reader import draw_order
from ultralong.evaluation.tasks.scoring import match_all, match_part
from ultralong.evaluation.tasks.task import Draft, Setting, Task

PREFIX = "own_"
PIN = "@sha256:"  # behind the path in a run's settings
MAX_NEW_TOKENS = 128  # as for LongBench v2's answers


def is_file(word: str) -> bool:
    """Whether a test is named by the path of a file of questions, pinned or not."""
    return word.partition(PIN)[0].endswith(".jsonl")


def is_own(name: str) -> bool:
    """Whether answers and reports call a test of one's own so."""
    return re.fullmatch(rf"{PREFIX}\w+", name) is not None


def path_of(word: str) -> Path:
    """The file that names a test, without its pin."""
    return Path(word.partition(PIN)[0]).expanduser()


def own_task(word: str) -> Task:
    """The test for the path of a file, or for the name that answers have; scoring needs no file."""
    path = path_of(word) if is_file(word) else None
    name = word if path is None else PREFIX + re.sub(r"\W", "_", path.stem)
    return Task(
        name, MAX_NEW_TOKENS, partial(prepare, name, path), score, ("wants_all",), capability="question answering"
    )


def score(answer: str, references: Sequence[str], wants_all: bool | None = None) -> float:
    """RULER's string match: any reference stands in the answer; with `wants_all` the share of them that do."""
    return (match_all if wants_all else match_part)(answer, references)


def files_of(words: Iterable[str]) -> dict[str, Path]:
    """Files of questions among the tests of a run, by the name of their test.

    Raises:
        ValueError: Two files would be called alike.
    """
    found: dict[str, Path] = {}
    for word in filter(is_file, words):
        path, name = path_of(word), own_task(word).name
        if found.setdefault(name, path) != path:
            raise ValueError(f"{found[name]} and {path} would both be called {name}: rename one of them.")
    return found


def pinned(word: str) -> str:
    """The path of a file with its digest, all lines checked.

    Raises:
        ValueError: As for `read_questions`, or the path is pinned and the file is another one now.
    """
    path, (_, _, pin) = path_of(word), word.partition(PIN)
    digest = read_questions(path).digest
    if pin and pin != digest:
        raise ValueError(
            f"{path} has changed: its SHA-256 is {digest}, and the run's is {pin}. Restore it; or, for the file as it "
            "is now, name its path alone and give another --out."
        )
    return f"{path}{PIN}{digest}"


@functools.lru_cache(maxsize=4)
def _tokens(path: Path, digest: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[int, ...]:
    """Tokens of every question's prompt and answer; the digest is what makes two reads the same."""
    questions, frame = read_questions(path), make_frame(tokenizer, chat)
    drafts = (questions.draft(number, chat) for number in range(len(questions.ids)))
    return tuple(
        len(encode_prompt(tokenizer, frame, draft.input, draft.answer_prefix).ids) + MAX_NEW_TOKENS for draft in drafts
    )


def lay_out(
    path: Path, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], chat: bool | None = None
) -> tuple[dict[int, int], dict[str, str]]:
    """How many questions belong to each length, and why others belong to none, by id.

    Args:
        path: The file.
        tokenizer: Counts the tokens.
        lengths: Tokens of prompt and answer together.
        chat: As for `make_samples`.

    Raises:
        ValueError: As for `read_questions`.
    """
    questions = read_questions(path)
    counted = _tokens(path, questions.digest, tokenizer, bool(tokenizer.chat_template) if chat is None else chat)
    counts, too_long = dict.fromkeys(sorted(lengths), 0), {}
    for name, tokens in zip(questions.ids, counted, strict=True):
        if (length := next((length for length in counts if tokens <= length), None)) is not None:
            counts[length] += 1
        else:
            too_long[name] = (
                f"{tokens:,} tokens with its answer, more than the longest length, {max(lengths):,}, and none is cut"
            )
    return counts, too_long


def check_fits(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, chat: bool | None = None) -> None:
    """See that a length holds every question.

    Raises:
        ValueError: It does not; the message names those too long.
    """
    too_long = lay_out(path, tokenizer, [length], chat)[1]
    if too_long:
        told = "; ".join(f"question {name}: {reason}" for name, reason in list(too_long.items())[:MOST_TOLD])
        more = f"; and {len(too_long) - MOST_TOLD} more" if len(too_long) > MOST_TOLD else ""
        raise ValueError(f"{path} cannot be asked. {told}{more}. Ask at a longer length, or shorten the context.")


@dataclass(frozen=True)
class OwnReader:
    """Makes prompts of the questions that belong to one length; `numbers` are their rows, `above` the length below."""

    name: str
    chat: bool
    questions: Questions
    numbers: tuple[int, ...]
    above: int

    @property
    def source(self) -> str:
        """The file and its digest."""
        return f"{self.questions.rows.path.name} (SHA-256 {self.questions.digest})"

    def __len__(self) -> int:
        return len(self.numbers)

    def draft(self, seed: int, index: int) -> Draft:
        """Sample `index`, in an order drawn from the seed: the first few of a file may be alike."""
        draft = self.questions.draft(self.numbers[draw_order(self.name, len(self.numbers), seed)[index]], self.chat)
        return Draft(draft.input, draft.answer_prefix, draft.outputs, extra={**draft.extra, "above": self.above})


def prepare(name: str, path: Path | None, setting: Setting) -> OwnReader:
    """The reader of the questions between two lengths.

    Raises:
        ValueError: No file is named, or as for `read_questions`; without a length below, one question is too long.
    """
    path = setting.questions or path
    if path is None:
        raise ValueError(
            f"{name} is a test of a file: name the file, such as folder/{name.removeprefix(PREFIX)}.jsonl."
        )
    if setting.above is None:
        check_fits(path, setting.tokenizer, setting.length, setting.chat)
    questions, above = read_questions(path), setting.above or 0
    counted = _tokens(path, questions.digest, setting.tokenizer, setting.chat)
    numbers = tuple(number for number, tokens in enumerate(counted) if above < tokens <= setting.length)
    return OwnReader(name, setting.chat, questions, numbers, above)


def check_resumed(where: Path, record: Mapping[str, Any], digest: str, spans: Iterable[tuple[int, int]] = ()) -> None:
    """See that answers that are there are of the same file, and their length holds the same questions.

    Args:
        where: The file of answers.
        record: Its first record.
        digest: The file of questions' now.
        spans: Each length now, with the one below it: (`above`, `length`).

    Raises:
        ValueError: They are not.
    """
    if record.get("questions_sha256") != digest:
        raise ValueError(
            f"{where} holds answers to another state of the questions (SHA-256 {record.get('questions_sha256')}, now "
            f"{digest}): restore the file, or give another --out."
        )
    low, high = record["above"], record["max_length"]
    for above, length in spans:
        if (above, length) != (low, high) and max(above, low) < min(length, high):
            raise ValueError(
                f"{where} holds questions of {low:,} to {high:,} tokens, which --lengths would share out again at "
                f"{length:,}: ask at the same lengths, or give another --out."
            )
