"""Samples and answers as files: written one by one, continued where a run stopped, scored whole.

A file is one JSON record a line. What is there is never written again: a run that is started anew with the same
settings goes on behind the last whole line, and one with other settings is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.measures.intervals import paired_difference
from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.runs.sample_prefetch import Making
from ultralong.evaluation.tasks.samples import find_task, make_samples, prompt_ids
from ultralong.inference.engines import Engine, OwnEngine
from ultralong.utils.files import append_jsonl, locked, read_jsonl, write_json
from ultralong.utils.progress import progress

SAME = ("task", "seed", "max_length")
# RULER's bar: the score of Llama-2-7B-chat at 4K tokens (Hsieh et al. 2024, section 4).
EFFECTIVE_SCORE = 85.6


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
        found = [record.get(key) for key in SAME]
        if found != [task, seed, length] or record.get("index") != number:
            raise ValueError(
                f"{path}, line {number + 1} is of another run: task, seed, length {found} and index "
                f"{record.get('index')}, expected {[task, seed, length]} and {number}. Give another --out "
                "or delete the file."
            )
    return records


def write_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int,
    out: str | os.PathLike[str],
    *,
    chat: bool | None = None,
    haystack: Sequence[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make samples into a file, going on where an earlier call stopped.

    Args:
        task: Name of the test.
        tokenizer: Counts the tokens; its chat template is the frame.
        length: Most tokens of prompt and answer together.
        samples: How many the file shall hold.
        seed: Seed of all draws.
        out: The file, JSON lines.
        chat: As for `make_samples`.
        haystack: As for `make_samples`.
        questions: As for `make_samples`.
        quiet: True draws no progress bar.

    Returns:
        `task`, `out`, `samples`, `made` (now), `shortest` and `longest` (tokens), `source`.

    Raises:
        ValueError: As for `make_samples`; or the file is of another run.
    """
    there = done_already(out, task, length, seed)
    find_task(task)
    lengths = [record["length"] for record in there]
    source = there[-1]["source"] if there else ""
    missing = max(0, samples - len(there))
    made = (
        make_samples(
            task, tokenizer, length, missing, seed, first=len(there), chat=chat, haystack=haystack, questions=questions
        )
        if missing
        else ()
    )
    for record in progress(made, total=missing, desc=task, unit="sample", quiet=quiet):
        append_jsonl(out, record)
        lengths.append(record["length"])
        source = record["source"]
    return {
        "task": task,
        "out": str(out),
        "samples": len(lengths),
        "made": missing,
        "shortest": min(lengths),
        "longest": max(lengths),
        "source": source,
    }


def score_file(task: str, predictions: str | os.PathLike[str]) -> dict[str, Any]:
    """Score a file of answers: each line the sample's `outputs` (and `max_length`) with the model's `prediction`.

    Raises:
        ValueError: There is no such file, or what `score_predictions` refuses.
    """
    path = Path(predictions)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    return score_predictions(task, read_jsonl(path))


def answer_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    out: str | os.PathLike[str],
    *,
    chunk: int | None = None,
    batch: int | None = None,
    engine: Engine | None = None,
    chat: bool | None = None,
    haystack: Sequence[str] | None = None,
    questions: Mapping[str, str | os.PathLike[str]] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Let a model answer tests at several lengths, and score it.

    Answers are appended to `out/TASK-LENGTH.jsonl` as they come (without the prompts, which can be made again), and the
    scores are written to `out/scores.json` at the end. Started again after a stop, it goes on.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.
        tasks: Names of tests.
        lengths: Tokens of prompt and answer together.
        samples: Samples of each test at each length.
        seed: Seed of the samples.
        out: Folder of answers and scores.
        chunk: Tokens of one prefill pass; None takes a prompt at once.
        batch: Prompts to answer together, see `OwnEngine`.
        engine: What answers; None is `OwnEngine`.
        chat: As for `make_samples`.
        haystack: As for `make_samples`.
        questions: For tests on published questions: name of the test to its file.
        quiet: True draws no progress bar.

    Returns:
        `scores`, one dictionary a test and length (`task`, `length`, `n`, `score`, `low`, `high`, `seconds`), and
        `means`, one a length with the unweighted mean over the tests (`length`, `tasks`, `score`).

    Raises:
        ValueError: As for `make_samples`; or the folder holds another run.
    """
    pairs = [(find_task(task).name, int(length)) for length in lengths for task in tasks]
    engine = OwnEngine(model, tokenizer, chunk, batch) if engine is None else engine
    scores = answer_pairs(
        engine, tokenizer, pairs, samples, seed, out, chat=chat, haystack=haystack, questions=questions, quiet=quiet
    )
    result = {"scores": scores, "means": mean_by_length(scores)}
    write_json(Path(out) / "scores.json", result)
    return result


def answer_pairs(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, int]],
    samples: int,
    seed: int,
    out: str | os.PathLike[str],
    *,
    workers: int = 0,
    chat: bool | None = None,
    haystack: Sequence[str] | None = None,
    questions: Mapping[str, str | os.PathLike[str]] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """As `answer_tasks`, by any engine and for chosen pairs of a test and a length; returns the scores, writes none.

    A set of published texts may hold fewer samples than asked for; `n` says how many there were. `workers` processes
    make samples ahead.
    """
    out = Path(out)
    with locked(out):
        held = {
            (task, length): done_already(out / f"{task}-{length}.jsonl", task, length, seed)[:samples]
            for task, length in pairs
        }
        _fill(
            held, engine, tokenizer, samples, seed, out, workers, questions, {"chat": chat, "haystack": haystack}, quiet
        )
    scores = []
    for (task, length), there in held.items():
        scored = score_predictions(task, there)
        kept = {key: scored[key] for key in ("n", "score", "low", "high")}
        seconds = round(sum(record["seconds"] for record in there), 3)
        scores.append({"task": task, "length": length, **kept, "seconds": seconds})
    return scores


def _fill(
    held: Mapping[tuple[str, int], list[dict[str, Any]]],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seed: int,
    out: Path,
    workers: int,
    questions: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    quiet: bool,
) -> None:
    """Answer what is missing, into the lists and the files."""
    wanted = {pair: (len(there), samples - len(there)) for pair, there in held.items()}
    with (
        progress(
            total=sum(length for _, length in held) * samples, desc="answers", unit="tok", unit_scale=True, quiet=quiet
        ) as bar,
        Making(tokenizer, wanted, seed, workers=workers, questions=questions, **options) as making,
    ):
        # Neighbours of one length are answered together, whatever the test.
        for length, group in groupby(held, key=lambda pair: pair[1]):
            together = list(group)
            bar.update(length * sum(len(held[pair]) for pair in together))
            for record in _answered(engine, tokenizer, making.of(together), length):
                append_jsonl(out / f"{record['task']}-{length}.jsonl", record)
                held[record["task"], length].append(record)
                bar.set_postfix_str(f"{record['task']} {length:,}")
                bar.update(length)
            bar.update(length * sum(samples - len(held[pair]) for pair in together))


def _answered(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, samples: Iterator[dict[str, Any]], length: int
) -> Iterator[dict[str, Any]]:
    """Samples with their answers; of those answered together each has its share of the seconds."""
    at_once = engine.at_once(length)
    while batch := list(islice(samples, at_once)):
        start = time.perf_counter()
        prompts, budgets = [prompt_ids(tokenizer, sample) for sample in batch], [s["max_new_tokens"] for s in batch]
        if at_once == 1:
            answers = [engine.answer(prompts[0], budgets[0], length)]
        else:
            answers = [(said, 0) for said in engine.answer_many(prompts, budgets)]
        seconds = (time.perf_counter() - start) / len(batch)
        for sample, (said, reused) in zip(batch, answers, strict=True):
            kept = {key: value for key, value in sample.items() if key != "input"}
            yield {**kept, "prediction": said, "engine": engine.name, "reused": reused, "seconds": round(seconds, 3)}


def mean_by_length(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Unweighted mean over the tests at each length, as RULER averages; `tasks` says over how many."""
    groups = [
        (length, [item["score"] for item in scores if item["length"] == length])
        for length in sorted({item["length"] for item in scores})
    ]
    return [{"length": length, "tasks": len(group), "score": float(np.mean(group))} for length, group in groups]


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
    names = sorted(
        {path.name for path in Path(first).glob("*-*.jsonl")} & {path.name for path in Path(second).glob("*-*.jsonl")}
    )
    if not names:
        raise ValueError(f"{first} and {second} hold no answers to the same test at the same length.")
    compared = []
    for name in names:
        pairs = list(zip(*(read_jsonl(Path(folder) / name) for folder in (first, second)), strict=False))
        if not pairs or any(_identity(one) != _identity(other) for one, other in pairs):
            raise ValueError(
                f"{name} holds other samples in {first} than in {second}: use the same seed and the same tokenizer."
            )
        task, length = pairs[0][0]["task"], pairs[0][0]["max_length"]
        grade = find_task(task).grade
        scores = [[100 * grade(record) for record in records] for records in zip(*pairs, strict=True)]
        difference = paired_difference(*scores, seed=seed)
        ends = (difference.low, difference.high) if len(pairs) > 1 else (None, None)
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
    return sorted(compared, key=lambda item: (item["task"], item["length"]))


def _identity(record: Mapping[str, Any]) -> list[Any]:
    """What makes two samples the same one."""
    return [*(record[key] for key in (*SAME, "index")), *record["outputs"]]


def effective_length(means: Sequence[Mapping[str, Any]], bar: float = EFFECTIVE_SCORE) -> int | None:
    """The longest length up to which every mean score reaches the bar; None where the shortest does not.

    RULER calls the longest length above the bar effective; a model that dips below in between is not given the rest.
    """
    reached = None
    for mean in sorted(means, key=lambda mean: mean["length"]):
        if mean["score"] < bar:
            break
        reached = mean["length"]
    return reached
