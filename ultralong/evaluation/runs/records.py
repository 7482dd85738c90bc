"""Samples and answers written one by one, resumed where a run stopped, scored whole.

A file is one JSON record a line. What is there is never written again: a run that is started again with the same
settings resumes behind the last whole line, and one with other settings is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.measures.result import Result, write_measurements
from ultralong.evaluation.measures.score import mean_by_length
from ultralong.evaluation.runs.answer_files import answers_path, check_own_answers, done_already, task_results
from ultralong.evaluation.runs.sample_prefetch import SamplePrefetch, length_below
from ultralong.evaluation.tasks.own import own_task as own
from ultralong.evaluation.tasks.own.question_file import read_questions
from ultralong.evaluation.tasks.samples import find_task, make_samples, prompt_ids
from ultralong.inference.engines import Engine, LocalEngine
from ultralong.utils.files import append_jsonl, file_lock, locked, make_folder
from ultralong.utils.progress import progress


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
    """Make samples into a file; what an earlier call left there is kept.

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
        ValueError: As for `make_samples`; the file is of another run, or another process is writing it.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, found {samples}.")
    questions = own.path_of(task) if own.is_file(task) else questions
    task, out = find_task(task).name, Path(out)
    busy = f"Another process is writing to {out}: wait for it, end it, or give another --out."
    with file_lock(make_folder(out.parent) / f".{out.name}.lock", busy, remove=True):
        there = done_already(out, task, length, seed)
        if there and own.is_own(task) and questions is not None:
            own.check_resumed(out, there[0], read_questions(Path(questions)).digest)
        lengths = [record["length"] for record in there]
        source = there[-1]["source"] if there else ""
        missing = max(0, samples - len(there))
        made = (
            make_samples(
                task,
                tokenizer,
                length,
                missing,
                seed,
                first=len(there),
                chat=chat,
                haystack=haystack,
                questions=questions,
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
    scores are written to `out/results.json` at the end. Started again after a stop, it resumes.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.
        tasks: Names of tests, or paths of files of questions.
        lengths: Tokens of prompt and answer together.
        samples: Samples of each test at each length.
        seed: Seed of the samples.
        out: Folder of answers and scores.
        chunk: Tokens of one prefill pass; None takes a prompt at once.
        batch: Prompts to answer together, see `LocalEngine`.
        engine: What answers; None is `LocalEngine`.
        chat: As for `make_samples`.
        haystack: As for `make_samples`.
        questions: For tests on published questions: name of the test to its file.
        quiet: True draws no progress bar.

    Returns:
        `results`, one `Result` a test as JSON values, and `means`, one a length with the unweighted mean over the
        tests (`length`, `tasks`, `score`).

    Raises:
        ValueError: As for `make_samples`; or the folder holds another run.
    """
    pairs = [(find_task(task).name, int(length)) for length in lengths for task in tasks]
    files = own.files_of(tasks)
    for path in files.values():
        own.check_fits(path, tokenizer, max(lengths), chat)
    questions = {**(questions or {}), **files}
    engine = LocalEngine(model, tokenizer, chunk, batch) if engine is None else engine
    with locked(out):
        results = answer_pairs(
            engine, tokenizer, pairs, samples, seed, out, chat=chat, haystack=haystack, questions=questions, quiet=quiet
        )
        write_measurements(Path(out) / "results.json", results)
    return {"results": [result.to_dict() for result in results], "means": mean_by_length(results)}


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
    left_out: dict[tuple[str, int], str] | None = None,
    quiet: bool = False,
) -> list[Result]:
    """As `answer_tasks`, by any engine and for chosen pairs of a test and a length; returns the results, writes none.

    A set of published texts may hold fewer samples than asked for; `n` says how many there were. `workers` processes
    make samples ahead. With `left_out`, a test whose next sample cannot be made is left at what it has, and its reason
    is put there; without, it stops the run. The caller holds the folder (`locked`).
    """
    out = Path(out)
    files = {task: Path(path) for task, path in (questions or {}).items() if own.is_own(task)}
    spans = {task: [(length_below(pairs, pair), pair[1]) for pair in pairs if pair[0] == task] for task in files}
    check_own_answers(out, files, spans)
    held = {
        (task, length): done_already(answers_path(out, task, length), task, length, seed)[:samples]
        for task, length in pairs
    }
    options = {"chat": chat, "haystack": haystack, "lenient": left_out is not None}
    failed = _fill(held, engine, tokenizer, samples, seed, out, workers, questions, options, quiet)
    if left_out is not None:
        left_out.update(failed)
    return task_results({pair: records for pair, records in held.items() if records or pair not in failed})


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
) -> dict[tuple[str, int], str]:
    """Answer what is missing, into the lists and the files; returns the reasons of what was left out."""
    wanted = {pair: (len(there), samples - len(there)) for pair, there in held.items()}
    with (
        progress(
            total=sum(length for _, length in held) * samples, desc="answers", unit="tok", unit_scale=True, quiet=quiet
        ) as bar,
        SamplePrefetch(tokenizer, wanted, seed, workers=workers, questions=questions, **options) as prefetch,
    ):
        # Neighbours of one length are answered together, whatever the test.
        for length, group in groupby(held, key=lambda pair: pair[1]):
            together = list(group)
            bar.update(length * sum(len(held[pair]) for pair in together))
            for record in _answered(engine, tokenizer, prefetch.of(together), length):
                append_jsonl(answers_path(out, record["task"], length), record)
                held[record["task"], length].append(record)
                bar.set_postfix_str(f"{record['task']} {length:,}", refresh=False)
                bar.update(length)
            bar.update(length * sum(samples - len(held[pair]) for pair in together))
        return prefetch.failed


def _answered(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, samples: Iterator[dict[str, Any]], length: int
) -> Iterator[dict[str, Any]]:
    """Samples with their answers; of those answered together each has its share of the seconds."""
    at_once = engine.max_batch(length)
    while batch := list(islice(samples, at_once)):
        start = time.perf_counter()
        prompts, budgets = [prompt_ids(tokenizer, sample) for sample in batch], [s["max_new_tokens"] for s in batch]
        answers = engine.answer(prompts, budgets, capacity=length)
        seconds = (time.perf_counter() - start) / len(batch)
        for sample, said in zip(batch, answers, strict=True):
            kept = {key: value for key, value in sample.items() if key != "input"}
            found = {"prediction": said.text, "engine": engine.name, "reused": said.reused}
            yield {**kept, **found, "seconds": round(seconds, 3)}
