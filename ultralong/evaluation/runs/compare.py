"""Two models on the same samples: what changed, test by test, with paired intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ultralong.evaluation.measures.intervals import alike_difference, paired_difference
from ultralong.evaluation.measures.score import grades
from ultralong.evaluation.runs.answer_files import answer_files
from ultralong.evaluation.tasks.samples import current_name
from ultralong.utils.files import read_jsonl
from ultralong.utils.units import check_seed


def compare_answers(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Two models on the same samples: the difference of each test at each length, sample by sample.

    Args:
        first: Folder that `answer_tasks` wrote for the first model.
        second: The same for the second.
        seed: Seed of the bootstrap.

    Returns:
        One dictionary a test and length that both have: `task`, `length`, `n`, `first` and `second` (per cent), and
        `difference`, `low`, `high` (per cent points, second minus first; the ends are None below two samples).

    Raises:
        ValueError: Nothing in common, or files of the same name whose samples differ.
    """
    check_seed(seed)
    one, other = answer_files(Path(first)), answer_files(Path(second))
    both = sorted(one.keys() & other.keys())
    if not both:
        raise ValueError(f"{first} and {second} hold no answers to the same test at the same length.")
    compared = []
    for task, length in both:
        pairs = list(zip(read_jsonl(one[task, length]), read_jsonl(other[task, length]), strict=False))
        if not pairs or any(_identity(before) != _identity(after) for before, after in pairs):
            raise ValueError(
                f"{task} at {length:,} has other samples in {first} than in {second}: use the same seed and the same "
                "tokenizer, and for a file of questions the same file and lengths."
            )
        scores = [[100 * grade for grade in grades(task, list(records))] for records in zip(*pairs, strict=True)]
        difference = paired_difference(*scores, seed=seed)
        ends = (difference.low, difference.high) if len(pairs) > 1 else (None, None)
        if len(pairs) > 1 and difference.low == difference.high:
            low, high = alike_difference(difference.mean / 100, len(pairs))
            ends = 100 * low, 100 * high
        compared.append(
            {
                "task": task,
                "length": length,
                "n": len(pairs),
                "first": float(np.mean(scores[0])),
                "second": float(np.mean(scores[1])),
                "difference": difference.mean,
                "low": ends[0],
                "high": ends[1],
            }
        )
    return compared


def _identity(record: Mapping[str, Any]) -> list[Any]:
    """What makes two samples the same one."""
    own = record.get("questions_sha256"), record.get("above")  # of a file of questions
    named = current_name(record["task"]), record["seed"], record["max_length"], record["index"]
    return [*named, *own, *record["outputs"]]
