"""Two models on the same samples: what changed, test by test and benchmark by benchmark, with paired intervals."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultralong.evaluation.measures.intervals import alike_difference, paired_difference
from ultralong.evaluation.measures.lm_eval import BENCHMARKS
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
        first: Folder that `answer_tasks` or `run` wrote for the first model.
        second: The same for the second.
        seed: Seed of the bootstrap.

    Returns:
        One dictionary a test and length that both have, then one a short benchmark: `task`, `length` (None of a
        benchmark), `n`, `first` and `second` (per cent), and `difference`, `low`, `high` (per cent points, second minus
        first; the ends are None below two samples).

    Raises:
        ValueError: A folder is not there, nothing is in common, or files of the same name whose samples differ.
    """
    check_seed(seed)
    first, second = Path(first), Path(second)
    for folder in (first, second):
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}: give the --out of `ultralong eval run`.")
    compared = [*_compare_tests(first, second, seed), *_compare_benchmarks(first, second, seed)]
    if not compared:
        raise ValueError(
            f"{first} and {second} hold no answers to the same test at the same length, and no samples of the same "
            "benchmark."
        )
    return compared


def _compare_tests(first: Path, second: Path, seed: int) -> list[dict[str, Any]]:
    one, other = answer_files(first), answer_files(second)
    compared = []
    for task, length in sorted(one.keys() & other.keys()):
        pairs = list(zip(read_jsonl(one[task, length]), read_jsonl(other[task, length]), strict=False))
        if not pairs or any(_identity(before) != _identity(after) for before, after in pairs):
            raise ValueError(
                f"{task} at {length:,} has other samples in {first} than in {second}: use the same seed and the same "
                "tokenizer, and for a file of questions the same file and lengths."
            )
        scores = [grades(task, list(records)) for records in zip(*pairs, strict=True)]
        compared.append(_paired(task, length, scores, seed))
    return compared


def _identity(record: Mapping[str, Any]) -> list[Any]:
    """What makes two samples the same one."""
    own = record.get("questions_sha256"), record.get("above")  # of a file of questions
    named = current_name(record["task"]), record["seed"], record["max_length"], record["index"]
    return [*named, *own, *record["outputs"]]


def _compare_benchmarks(first: Path, second: Path, seed: int) -> list[dict[str, Any]]:
    """lm-eval's benchmarks over the samples that both were asked: `--limit` takes the first of each task."""
    compared = []
    for name in BENCHMARKS:
        files = [_outcomes_file(folder, name) for folder in (first, second)]
        if None in files:
            continue
        one, other = ({(item["task"], item["index"]): item for item in read_jsonl(path)} for path in files if path)
        both = sorted(one.keys() & other.keys())
        if not both or any(one[sample]["doc"] != other[sample]["doc"] for sample in both):
            raise ValueError(f"{name} has other samples in {first} than in {second}: use the same data for both.")
        if any(one[sample]["prompt"] != other[sample]["prompt"] for sample in both):
            warnings.warn(
                f"{name}: the two models were asked the same samples in other words (another chat template, or other "
                "worked examples), which may be what their difference comes from.",
                stacklevel=3,
            )
        scores = [[side[sample]["score"] for sample in both] for side in (one, other)]
        compared.append(_paired(name, None, scores, seed))
    return compared


def _outcomes_file(folder: Path, benchmark: str) -> Path | None:
    """A benchmark's samples in a run's folder; None without the benchmark, and with a warning where it lacks them."""
    path = folder / "lm_eval" / f"{benchmark}.jsonl"
    if path.exists():
        return path
    if path.with_suffix(".json").exists():
        warnings.warn(
            f"{benchmark} was measured in {folder} before outcomes of samples were kept, and is not compared: delete "
            f"{path.with_suffix('.json')} and run again.",
            stacklevel=4,
        )
    return None


def _paired(task: str, length: int | None, scores: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """A row of the comparison from two models' scores (0 to 1) of the same samples."""
    first, second = ([100 * score for score in side] for side in scores)
    difference = paired_difference(first, second, seed=seed)
    ends = (difference.low, difference.high) if difference.n > 1 else (None, None)
    if difference.n > 1 and difference.low == difference.high:
        low, high = alike_difference(difference.mean / 100, difference.n)
        ends = 100 * low, 100 * high
    return {
        "task": task,
        "length": length,
        "n": difference.n,
        "first": float(np.mean(first)),
        "second": float(np.mean(second)),
        "difference": difference.mean,
        "low": ends[0],
        "high": ends[1],
    }
