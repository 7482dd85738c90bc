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
    from ultralong.evaluation.runs.commands import measure, summary

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
    print(summary(result))
    print(f"Picture and numbers are in {out}." if out else "For a picture and the numbers: --out FOLDER.")


def loss(
    model: Positional[str],
    rows: Positional[Path],
    /,
    *,
    before: str | None = None,
    max_rows: int | None = None,
    micro_batch_size: int = 1,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    device: str = "auto",
    json: Json = None,
) -> None:
    """Measure the loss on packed rows by the trainer's own path: on answers, where the rows are of conversations.

    The number is what a training step on these rows would log, with an interval over documents. With --before, a
    second model reads the same rows and the change is given with its own interval.

    Example: ultralong eval loss runs/sft/model answers --before runs/cpt/model

    Args:
        model: Folder or hub id.
        rows: Folder of packed rows, best of conversations that were kept apart.
        before: Another model to compare with.
        max_rows: Read only this many rows.
        micro_batch_size: Rows of one forward pass.
        dtype: What is computed in; auto is bfloat16 on a GPU, as in training.
        device: auto, cpu or cuda.
        json: Write the numbers as JSON to this file.
    """
    from ultralong.evaluation.measures.row_loss import measure_loss

    result = measure_loss(
        model, rows, before=before, device=device, most=max_rows, micro_batch_size=micro_batch_size, dtype=dtype
    )
    leave(json, result)
    print(f"{model}: {_loss_line(result)}")
    if before is not None:
        print(f"{before}: {_loss_line(result['before'])}")
        between = (
            "" if result["change_low"] is None else f" [{result['change_low']:+.4f}, {result['change_high']:+.4f}]"
        )
        print(f"change {result['change']:+.4f}{between}; the loss fell for {result['better']:.0%} of the documents")


def _loss_line(found: dict[str, Any]) -> str:
    between = "" if found["low"] is None else f" [{found['low']:.4f}, {found['high']:.4f}]"
    of = f"{found['targets']:,} targets of {found['documents']:,} documents"
    return f"{found['loss']:.4f}{between} nats per target, {of}"


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

    from ultralong.evaluation.runs.records import write_samples
    from ultralong.evaluation.tasks.haystack import read_haystack

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
    from ultralong.evaluation.runs.records import score_file

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
    chunk: int | None = None,
    gpus: int = 1,
    kv: Literal["auto", "fp8"] = "auto",
    batch: int | None = None,
    device: str = "auto",
    json: Json = None,
) -> None:
    """Let a model answer tests at several lengths, and score it. Stop it at any time; it goes on where it was.

    Examples:
      ultralong eval answer model --tasks niah_single_1 ruler_vt --lengths 4096 32768 --out runs/ruler
      ultralong eval answer model --tasks niah_single_1 --lengths 1048576 --gpus 2 --kv fp8 --out runs/long

    Args:
        model: Folder or hub id.
        tasks: Names of tests.
        lengths: Tokens of prompt and answer together.
        out: Folder of answers and scores.
        samples: Samples of each test at each length.
        seed: Seed of the samples.
        haystack: Text file or folder to fill prompts with.
        chunk: Tokens of one prefill pass; by default 16,384, or 65,536 a GPU with --gpus or --kv.
        gpus: GPUs that share a prompt; each holds the whole model and its part of the cache.
        kv: Type of keys and values: auto, or fp8, which takes half the memory and rounds them to 8 bits.
        batch: Short prompts to answer together; by default as many as fit on a GPU, one on a CPU.
        device: auto, cpu or cuda.
        json: Write the scores as JSON to this file.
    """
    from functools import partial

    from ultralong.evaluation.runs.commands import answer as work
    from ultralong.inference.long_engine import with_model

    result = with_model(
        partial(work, tasks, lengths, samples, seed, out, haystack, chunk, batch),
        model,
        gpus=gpus,
        kv=kv,
        chunk=chunk,
        device=device,
    )
    if result is None:  # one of torchrun's other processes
        return
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
    from ultralong.evaluation.runs.records import compare_answers

    rows = compare_answers(first, second)
    leave(json, rows)
    for row in rows:
        between = "" if row["low"] is None else f"  [{row['low']:+.1f}, {row['high']:+.1f}]"
        print(
            f"{row['task']:24} {row['length']:>9,}  {row['first']:6.1f} -> {row['second']:6.1f}  "
            f"{row['difference']:+.1f}{between}  n {row['n']}"
        )
