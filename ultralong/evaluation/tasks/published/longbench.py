"""LongBench v2 and LongBench Pro, read from the authors' own JSON files, with their published scores.

LongBench v2 (Bai et al. 2024, arXiv 2412.15204; huggingface.co/datasets/THUDM/LongBench-v2, `data.json`): 503 questions
with four choices over 8,000 to 2 million words. Right is the letter behind "The correct answer is", as the official
code looks for it. The wording of the question is our own.

LongBench Pro (Chen et al. 2026, arXiv 2601.02872; huggingface.co/datasets/caskcsg/LongBench-Pro, `longbench_pro.json`):
1,500 samples of 25 tasks in English and Chinese, each asked in the words of its own row, without thinking. The score
follows the task: NDCG, pairwise accuracy, accuracy, F1 or share of answers found, over the lines behind `[Answer]`. Its
two summary tasks (120 samples) are left out: their score needs an embedding model of 8B.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ultralong.data.read.fetch import DEFAULT_CACHE
from ultralong.evaluation.tasks.published.longbench_scores import PRO_MARKS, PRO_SCORES, pro_score, v2_score
from ultralong.evaluation.tasks.published.reader import LETTERS, Rows, draw_order, fill, from_hub
from ultralong.evaluation.tasks.task import Draft, Reader, Setting, Task
from ultralong.utils.files import atomic_path
from ultralong.utils.text_formats import json_value

FILES = {"longbench_v2": "data.json", "longbench_pro": "longbench_pro.json"}
HUBS = {"longbench_v2": "THUDM/LongBench-v2", "longbench_pro": "caskcsg/LongBench-Pro"}
V2_TASK = (
    "{context}\n\nThe text above is the source for a question with four choices, of which one is right.\n\nQuestion: "
    "{question}\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\nEnd with: The correct answer is (letter)."
)
V2_CUE = "\n\nThe correct answer is ("
V2_TOKENS = 128  # the official code's, for answers without reasoning
PRO_TOKENS = 1024  # the official setting's for models that do not think
LANGUAGES = {"en": "English", "zh": "Chinese"}


def find_rows(benchmark: str, given: Path | None) -> Path:
    """The benchmark's file with one row a line; the authors' list of rows is written so into the cache, once.

    Args:
        benchmark: `longbench_v2` or `longbench_pro`.
        given: The file (a JSON list, or JSON lines), or a folder that holds it at any depth; None asks the hub.

    Raises:
        ValueError: It is not there, or not a list of records.
    """
    name = FILES[benchmark]
    if given is None:
        path = from_hub(HUBS[benchmark], name, benchmark)
    elif given.is_file():
        path = given
    else:
        names = (name, f"{benchmark}.json", f"{benchmark}.jsonl")
        found = (min(given.rglob(wanted), default=None) for wanted in names)
        path = next((place for place in found if place is not None), given)
        if path == given:
            raise ValueError(f"{given} holds no {' and no '.join(names)}: put {name} of {HUBS[benchmark]} there.")
    return path if path.suffix == ".jsonl" else _as_lines(path)


def _as_lines(path: Path) -> Path:
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    target = DEFAULT_CACHE.expanduser() / "unpacked" / f"{path.stem}-{key}.jsonl"
    if target.exists():
        return target
    try:
        rows = json_value(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of records: give the authors' file, or one record a line.")
    with atomic_path(target) as part, open(part, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return target


@dataclass(frozen=True)
class LongBenchReader:
    """Makes prompts from rows of one of the two; `numbers` are the rows that the test asks.

    Attributes:
        name: Name of the test, which seeds the order of rows.
        benchmark: `longbench_v2` or `longbench_pro`.
        chat: Whether the prompt goes into a chat template.
        rows: The data.
        numbers: Rows by their number in the file.
    """

    name: str
    benchmark: str
    chat: bool
    rows: Rows
    numbers: tuple[int, ...]

    @property
    def source(self) -> str:
        """What the text is."""
        return f"{HUBS[self.benchmark]}, {FILES[self.benchmark]}"

    def __len__(self) -> int:
        return len(self.numbers)

    def draft(self, seed: int, index: int) -> Draft:
        """Sample `index`, in an order drawn from the seed."""
        number = self.numbers[draw_order(self.name, len(self.numbers), seed)[index]]
        row = self.rows[number]
        try:
            made = self._v2(row) if self.benchmark == "longbench_v2" else self._pro(row)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.rows.path}, row {number + 1} is not of {HUBS[self.benchmark]}: {error}."
            ) from error
        return replace(made, extra={"row": number, **made.extra})

    def _v2(self, row: Mapping[str, Any]) -> Draft:
        choices = {letter: str(row[f"choice_{letter}"]) for letter in LETTERS}
        message = fill(V2_TASK, {"context": row["context"], "question": row["question"], **choices})
        kept = {"domain": row["domain"], "difficulty": row["difficulty"], "words": row["length"]}
        return Draft(message, "" if self.chat else V2_CUE, (row["answer"],), extra=kept)

    def _pro(self, row: Mapping[str, Any]) -> Draft:
        kept = {"subtask": row["secondary_task"], "difficulty": row["difficulty"]}
        message = f"{row['context']}\n\n\n\n{row['question_nonthinking']}"  # as the official code joins them
        return Draft(message, "" if self.chat else f"\n\n{PRO_MARKS[0]}\n", tuple(row["answer"]), extra=kept)


@functools.lru_cache(maxsize=4)
def _numbers(path: Path, benchmark: str, language: str | None) -> tuple[Rows, tuple[int, ...]]:
    rows = Rows(path)
    if benchmark == "longbench_v2":
        return rows, tuple(range(len(rows)))
    kept = []
    for number in range(len(rows)):
        row = rows[number]
        asked = str(row.get("secondary_task", "")).split(" ")[0]
        if asked in PRO_SCORES and row.get("language") == LANGUAGES[language or "en"]:
            kept.append(number)
    if not kept:
        raise ValueError(f"{path} holds no row in {LANGUAGES[language or 'en']} of a task that is scored here.")
    return rows, tuple(kept)


def prepare(name: str, benchmark: str, language: str | None, setting: Setting) -> Reader:
    """The reader over the caller's file or the hub's.

    Raises:
        ValueError: The data is not there, or holds nothing of the kind.
    """
    rows, numbers = _numbers(find_rows(benchmark, setting.questions), benchmark, language)
    return LongBenchReader(name, benchmark, setting.chat, rows, numbers)


LONGBENCH_TASKS = {
    task.name: task
    for task in (
        Task(
            "longbench_v2",
            V2_TOKENS,
            partial(prepare, "longbench_v2", "longbench_v2", None),
            v2_score,
            ("answer_prefix",),
            capability="reasoning",
        ),
        *(
            Task(
                f"longbench_pro_{language}",
                PRO_TOKENS,
                partial(prepare, f"longbench_pro_{language}", "longbench_pro", language),
                pro_score,
                ("subtask",),
                capability="reasoning",
            )
            for language in LANGUAGES
        ),
    )
}
