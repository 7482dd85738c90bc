"""Files of answers: found, checked, read and scored, also those that version 0.3 or another program wrote."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralong.evaluation.measures.capability import capability_means, curve_areas
from ultralong.evaluation.measures.result import Part, Result
from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.tasks.own.own_task import check_resumed
from ultralong.evaluation.tasks.own.question_file import read_questions
from ultralong.evaluation.tasks.samples import TASKS, current_name, find_task, is_task
from ultralong.utils.files import read_jsonl
from ultralong.utils.text_formats import json_value

ANSWERS = re.compile(r"(\w+)-(\d+)\.jsonl")


def done_already(path: str | os.PathLike[str], task: str, length: int, seed: int) -> list[dict[str, Any]]:
    """Records that a file holds, checked to be of this task, length and seed and in order.

    Raises:
        ValueError: They are of another run.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = read_jsonl(path)
    for number, record in enumerate(records):
        found = [current_name(record.get("task", "")), record.get("seed"), record.get("max_length")]
        if found != [task, seed, length] or record.get("index") != number:
            raise ValueError(
                f"{path}, line {number + 1} is of another run: task, seed, length {found} and index "
                f"{record.get('index')}, expected {[task, seed, length]} and {number}. Give another --out "
                "or delete the file."
            )
    return records


def score_file(task: str, predictions: str | os.PathLike[str]) -> dict[str, Any]:
    """Score a file of answers: each line the sample's `outputs` (and `max_length`) with the model's `prediction`.

    Returns:
        The `Result` as JSON values; its value again as `score`, as version 0.3 called it; the test's `capability`,
        and in `areas` the area under its curve where the file holds several lengths (`capability.curve_areas`).

    Raises:
        ValueError: There is no such file, a line is no JSON object or of another test, two lines answer one sample, or
            what `score_predictions` refuses.
    """
    records = read_answers(Path(predictions))
    _check_samples(find_task(task).name, records)
    result = score_predictions(task, records)
    areas = curve_areas(capability_means([result]))
    return {**result.to_dict(), "score": result.value, "capability": find_task(task).capability, "areas": areas}


def _check_samples(task: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Each sample counts once, and by its own test's rule; of what other programs write, only as far as they say."""
    seen: dict[tuple[Any, ...], int] = {}
    for number, record in enumerate(records, 1):
        named = record.get("task")
        if isinstance(named, str) and is_task(current_name(named)) and current_name(named) != task:
            raise ValueError(f"Record {number} is an answer to {current_name(named)}, and is not scored as {task}.")
        if isinstance(record.get("index"), int):
            sample = tuple(repr(record.get(key)) for key in ("index", "max_length", "seed", "outputs"))
            if (first := seen.setdefault(sample, number)) != number:
                raise ValueError(
                    f"Records {first} and {number} answer one sample (index {record['index']}), which would count "
                    "twice: keep one of them."
                )


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines made by any program: the last line counts also without a line break.

    Raises:
        ValueError: There is no such file, or a line is no JSON object; the message names the line.
    """
    if path.is_dir() or not path.exists():  # a pipe can be read, as of `<(zcat answers.jsonl.gz)`
        raise ValueError(f"There is no file {path}.")
    records = []
    # Split at bytes: str.splitlines also splits at separators that JSON strings may hold, such as U+2028.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json_value(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: an object of fields is needed, found {type(record).__name__}.")
        records.append(record)
    return records


def answers_path(folder: Path, task: str, length: int) -> Path:
    """The file of a test's answers; one that version 0.3 wrote under the test's former name is kept in use."""
    path, former = folder / f"{task}-{length}.jsonl", find_task(task).former_name
    older = folder / f"{former}-{length}.jsonl"
    return older if former and older.exists() and not path.exists() else path


def answer_files(folder: Path) -> dict[tuple[str, int], Path]:
    """Files of answers in a folder, by test and length, in the order of their names."""
    found = {}
    for path in sorted(folder.glob("*-*.jsonl")):
        match = ANSWERS.fullmatch(path.name)
        if match is not None and is_task(current_name(match.group(1))):
            found[current_name(match.group(1)), int(match.group(2))] = path
    return found


def check_own_answers(folder: Path, files: Mapping[str, Path], spans: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """See that a folder's answers to files of questions are of these files and lengths.

    Args:
        folder: Folder of a run.
        files: The files by their tests' names.
        spans: Each test's lengths, each with the one below it; a test left out has them not checked.

    Raises:
        ValueError: As for `own_task.check_resumed`.
    """
    for (task, _), path in answer_files(folder).items():
        if task in files and (records := read_jsonl(path)):
            check_resumed(path, records[0], read_questions(files[task]).digest, spans.get(task, ()))


def task_results(held: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> list[Result]:
    """One result a test from its answers at several lengths, in the order of the tests.

    Details of each length: `seconds` that answering took, and `cut`, samples that lost their middle.

    Args:
        held: Records by test and length.

    Raises:
        ValueError: As for `score_predictions`.
    """
    results = []
    places = {name: place for place, name in enumerate(TASKS)}  # own questions have none, and come last
    for task in sorted({task for task, _ in held}, key=lambda task: (places.get(task, len(places)), task)):
        lengths = {length: records for (name, length), records in sorted(held.items()) if name == task}
        scored = score_predictions(task, [record for records in lengths.values() for record in records])
        by_length = tuple(_noted(part, lengths[part.length or 0]) for part in scored.by_length)
        results.append(replace(scored, by_length=by_length))
    return results


def _noted(part: Part, records: Sequence[Mapping[str, Any]]) -> Part:
    seconds = round(sum(record["seconds"] for record in records), 3)
    return replace(part, details={"seconds": seconds, "cut": sum(record.get("cut", 0) > 0 for record in records)})
