"""Commands that measure: a model, answers, a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ultralong.cli.shared import Json, leave


def evaluate(
    task: Positional[Literal["needle", "perplexity"]],
    model: Positional[str],
    /,
    *,
    lengths: tuple[int, ...] = (),
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 5,
    seed: int = 0,
    haystack: Path | None = None,
    rows: Path | None = None,
    max_rows: int = 16,
    device: str = "auto",
    out: Path | None = None,
    json: Json = None,
) -> None:
    """Measure a model: needle retrieval over lengths and depths, or perplexity by position.

    Examples:
      ultralong eval needle model --lengths 4096 16384 65536 --samples 10 --out runs/needle
      ultralong eval perplexity model --rows rows --out runs/perplexity

    Args:
        task: What to measure.
        model: Folder or hub id.
        lengths: needle: tokens of the prompts; by default eighths of the model's window.
        depths: needle: where the needle stands, from 0 (first) to 1 (last).
        samples: needle: prompts a cell.
        seed: Seed of the prompts.
        haystack: needle: text file or folder to hide the needle in; repeated filler without it.
        rows: perplexity: folder of packed rows.
        max_rows: perplexity: rows to use.
        device: auto, cpu or cuda.
        out: Folder for a picture and the numbers.
        json: Write the numbers as JSON to this file.
    """
    from ultralong.evaluation.commands import measure

    result = measure(
        task,
        model,
        lengths=lengths,
        depths=depths,
        samples=samples,
        seed=seed,
        haystack=haystack,
        rows=rows,
        max_rows=max_rows,
        device=device,
        out=out,
    )
    leave(json, result)


def run(
    tasks: Positional[str],
    model: Positional[str],
    /,
    *,
    out: Path,
    lengths: tuple[int, ...] = (),
    samples: int = 20,
    grid: tuple[int, int] = (40, 10),
    grid_samples: int = 3,
    seed: int = 0,
    before: Path | None = None,
    haystack: Path | None = None,
    data: Path | None = None,
    rows: Path | None = None,
    max_rows: int = 16,
    chat: bool | None = None,
    chunk: int | None = None,
    beyond_window: bool = False,
    skip_missing: bool = False,
    device: str = "auto",
    json: Json = None,
) -> None:
    """Measure a model on any of the tests, and write a report: JSON and one page. Stop it at any time; it goes on.

    `ultralong eval TESTS MODEL` is short for it. Tests are named with commas between them; groups are ruler, niah,
    infinitebench, infinitebench_synthetic, infinitebench_published, lveval, lveval_16k to lveval_256k, facts,
    nonliteral, needle (the map), perplexity and standard (lm-eval).

    Examples:
      ultralong eval run needle,ruler,facts,nonliteral model --lengths 4096 32768 131072 --samples 50 --out runs/model
      ultralong eval run lveval,infinitebench model --lengths 131072 --data published --out runs/model

    Args:
        tasks: Tests and groups, with commas between them.
        model: Folder or hub id.
        out: Folder of answers and report.
        lengths: Tokens of prompt and answer; by default doubled from 4,096 to the window.
        samples: Samples of each test at each length.
        grid: needle: how many lengths and depths.
        grid_samples: needle: prompts a cell.
        seed: Seed of the samples.
        before: Folder of a run of the model before, to set beside it.
        haystack: Text file or folder to fill prompts with.
        data: Folder of published data (LV-Eval, InfiniteBench, SQuAD, HotpotQA, benchmarks), or package for SQuAD.
        rows: perplexity: folder of packed rows.
        max_rows: perplexity: rows to use.
        chat: Ask in the model's chat template, or not; by default where there is one.
        chunk: Tokens of one prefill pass.
        beyond_window: Ask also at lengths beyond the model's window.
        skip_missing: Leave out tests whose data is missing.
        device: auto, cpu or cuda.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.run import RunSettings
    from ultralong.evaluation.run import run as measure

    words = {"haystack": haystack, "data": data, "rows": rows}
    wanted = RunSettings(
        model=model,
        tasks=tuple(tasks.split(",")),
        lengths=lengths,
        samples=samples,
        grid=grid,
        grid_samples=grid_samples,
        seed=seed,
        chunk=chunk,
        chat=chat,
        max_rows=max_rows,
        beyond_window=beyond_window,
        skip_missing=skip_missing,
        **{key: None if value is None else str(value) for key, value in words.items()},
    )
    result = measure(wanted, out, before=before, device=device)
    leave(json, result)
    _tell(result, out)


def report(folder: Positional[Path], /, *, before: Path | None = None, json: Json = None) -> None:
    """Write the report of a run anew from its answers, without the model; with --before, two models side by side.

    Example: ultralong eval report runs/after --before runs/before

    Args:
        folder: Folder that eval run wrote.
        before: The same for the model before.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.results import write_results

    result = write_results(folder, before)
    leave(json, result)
    _tell(result, folder)


def _tell(result: dict[str, Any], out: Path) -> None:
    for item in result["families"]:
        between = "" if item["low"] is None else f"  [{item['low']:.1f}, {item['high']:.1f}]"
        print(
            f"{item['family']:20} {item['length']:>9,}  {item['score']:6.1f}{between}  {item['tasks']} tests, "
            f"n {item['n']}"
        )
    if result["effective"] is not None:
        reached = result["effective"]["length"]
        print(f"effective length (RULER, {result['effective']['bar']}): {f'{reached:,}' if reached else 'none'}")
    print(f"{out / 'report.html'}")


def make_samples(
    task: Positional[str],
    /,
    *,
    length: int,
    samples: int,
    tokenizer: str,
    out: Path,
    seed: int = 0,
    haystack: Path | None = None,
    questions: str | None = None,
    json: Json = None,
) -> None:
    """Write samples of a test without a model: RULER, InfiniteBench, LV-Eval, chained facts, needles.

    Example: ultralong eval make ruler_vt --length 131072 --samples 20 --tokenizer model --out vt.jsonl

    Args:
        task: Name of the test, such as needle, niah_single_1, ruler_vt, facts_qa2 or lveval_cmrc_mixup_16k.
        length: Most tokens of prompt and answer together.
        samples: How many.
        tokenizer: Folder or hub id of the model whose tokenizer counts.
        out: File of JSON lines: input, answer_prefix, outputs, length, max_new_tokens.
        seed: Seed of all draws; sample k of a seed is always the same.
        haystack: Text file or folder to fill prompts with, where the test has a haystack.
        questions: File or folder of published questions, or package, for the tests that need them.
        json: Write what was made as JSON to this file.
    """
    from transformers import AutoTokenizer

    from ultralong.evaluation.commands import read_haystack
    from ultralong.evaluation.records import write_samples

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    made = write_samples(
        task, loaded, length, samples, seed, out, haystack=read_haystack(haystack), questions=questions
    )
    leave(json, made)
    print(
        f"{out}: {made['samples']} samples of {made['shortest']:,} to {made['longest']:,} tokens. Next: let a model "
        f"answer them into `prediction`, then ultralong eval score {task} PREDICTIONS"
    )


def score(task: Positional[str], predictions: Positional[Path], /, *, json: Json = None) -> None:
    """Score answers by the test's own rule: each line a sample with the model's `prediction`.

    Example: ultralong eval score ruler_vt answers.jsonl

    Args:
        task: Name of the test.
        predictions: File of JSON lines.
        json: Write the score as JSON to this file.
    """
    from ultralong.evaluation.records import score_file

    result = score_file(task, predictions)
    leave(json, result)
    print(", ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, list | dict)))


def answer(
    model: Positional[str],
    /,
    *,
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    out: Path,
    samples: int = 20,
    seed: int = 0,
    haystack: Path | None = None,
    chunk: int | None = 16384,
    device: str = "auto",
    json: Json = None,
) -> None:
    """Let a model answer tests at several lengths, and score it. Stop it at any time; it goes on where it was.

    Example: ultralong eval answer model --tasks niah_single_1 ruler_vt --lengths 4096 32768 --out runs/ruler

    Args:
        model: Folder or hub id.
        tasks: Names of tests.
        lengths: Tokens of prompt and answer together.
        out: Folder of answers and scores.
        samples: Samples of each test at each length.
        seed: Seed of the samples.
        haystack: Text file or folder to fill prompts with.
        chunk: Tokens of one prefill pass.
        device: auto, cpu or cuda.
        json: Write the scores as JSON to this file.
    """
    from ultralong.evaluation.commands import open_model, read_haystack
    from ultralong.evaluation.records import answer_tasks

    loaded, tokenizer = open_model(model, device)
    result = answer_tasks(
        loaded, tokenizer, tasks, lengths, samples, seed, out, chunk=chunk, haystack=read_haystack(haystack)
    )
    leave(json, result)
    for row in result["scores"]:
        interval = f"[{row['low']:.1f}, {row['high']:.1f}]"
        print(f"{row['task']:24} {row['length']:>9,}  {row['score']:6.1f}  {interval}  n {row['n']}")


def compare(first: Positional[Path], second: Positional[Path], /, *, json: Json = None) -> None:
    """Two models on the same samples: differences test by test, with intervals.

    Example: ultralong eval compare runs/before runs/after

    Args:
        first: Folder that eval answer wrote for one model.
        second: The same for the other.
        json: Write the differences as JSON to this file.
    """
    from ultralong.evaluation.records import compare_answers

    rows = compare_answers(first, second)
    leave(json, rows)
    for row in rows:
        between = "" if row["low"] is None else f"  [{row['low']:+.1f}, {row['high']:+.1f}]"
        print(
            f"{row['task']:24} {row['length']:>9,}  {row['first']:6.1f} -> {row['second']:6.1f}  "
            f"{row['difference']:+.1f}{between}  n {row['n']}"
        )
