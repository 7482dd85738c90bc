"""Commands that measure a model, and samples and answers of tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import File, Json, leave
from ultralong.utils.hub import find_checkpoint, load_tokenizer
from ultralong.utils.units import Tokens


@takes(work=Group("ultralong.api.measure:needle", positional=("model",)))
def needle(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Hide a number in long prompts and ask for it: how often it is found, by length and depth.

    This is `ultralong eval run needle MODEL` with a small map; with --out it is resumed there after a stop.

    Examples:
      ultralong eval needle model --lengths 4k 16k 64k --samples 10 --out runs/needle
      ultralong eval needle model --engine openai --endpoint http://localhost:8000/v1

    Args:
        work: The function, with the model and the map.
        json: Write the numbers as JSON to this file.
    """
    _show(work(), work.keywords["out"], json)


@takes(work=Group("ultralong.api.measure:perplexity", positional=("model",)))
def perplexity(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Measure perplexity by position on packed rows, with an interval for each stretch.

    Example: ultralong eval perplexity model --rows rows --out runs/perplexity

    Args:
        work: The function, with the model and the rows.
        json: Write the numbers as JSON to this file.
    """
    _show(work(), work.keywords["out"], json)


def _show(result: dict[str, Any], out: Path | None, json: Path | None) -> None:
    from ultralong.evaluation.runs.commands import summary

    leave(json, result)
    print(summary(result))
    print(f"The report is {out / 'report.html'}." if out else "For a page with figures: --out FOLDER.")


def loss(
    model: Positional[str],
    rows: Positional[Path],
    /,
    *,
    before: Annotated[str | None, arg(metavar="MODEL")] = None,
    max_rows: int | None = None,
    micro_batch_size: int = 1,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    device: str = "auto",
    json: Json = None,
) -> None:
    """Measure the loss on packed rows as training does; on answers, in rows of conversations.

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

    place, other = find_checkpoint(model), None if before is None else find_checkpoint(before)
    result = measure_loss(
        place, rows, before=other, device=device, most=max_rows, micro_batch_size=micro_batch_size, dtype=dtype
    )
    leave(json, result)
    print(f"{model}: {_loss_line(result['result'])}")
    if before is not None:
        change = result["change"]
        print(f"{before}: {_loss_line(result['before']['result'])}")
        between = "" if change["low"] is None else f" [{change['low']:+.4f}, {change['high']:+.4f}]"
        print(f"change {change['change']:+.4f}{between}; the loss fell for {change['better']:.0%} of the documents")


def _loss_line(found: dict[str, Any]) -> str:
    from ultralong.evaluation.measures.result import Result, interval_text

    result = Result.from_dict(found)
    of = f"{result.n:,} targets of {result.details['documents']:,} documents"
    return f"{result.value:.4f} [{interval_text(result, '{:.4f}')}] nats per target, {of}"


def make_samples(
    task: Positional[str],
    /,
    *,
    length: Tokens,
    samples: int,
    tokenizer: str,
    out: File,
    seed: int = 0,
    haystack: Path | None = None,
    questions: str | None = None,
    json: Json = None,
) -> None:
    """Write samples of a test to a file, for a model that runs elsewhere.

    Tests are RULER's, InfiniteBench's, LV-Eval's, GraphWalks (graphwalks_bfs, graphwalks_parents), HELMET's json_kv,
    MRCR-style (mrcr_style_2needles, _4needles, _8needles), OOLONG-style (oolong_style_counting, _user, _timeline),
    BABILong-style and non-literal questions, and needles.

    Example: ultralong eval make ruler_vt --length 128k --samples 20 --tokenizer model --out vt.jsonl

    Args:
        task: Name of the test, such as needle, niah_single_1, ruler_vt, babilong_style_qa2 or lveval_cmrc_mixup_16k.
        length: Most tokens of prompt and answer together.
        samples: Number of samples.
        tokenizer: Folder or hub id of the model whose tokenizer counts.
        out: File of JSON lines: input, answer_prefix, outputs, length, max_new_tokens.
        seed: Seed of all draws; sample k of a seed is always the same.
        haystack: Text file or folder to fill prompts with, where the test has a haystack.
        questions: File or folder of published questions, or package, for the tests that need them.
        json: Write what was made as JSON to this file.
    """
    from ultralong.evaluation.runs.records import write_samples
    from ultralong.evaluation.tasks.haystack import read_haystack

    loaded = load_tokenizer(tokenizer)
    made = write_samples(
        task, loaded, length, samples, seed, out, haystack=read_haystack(haystack), questions=questions
    )
    leave(json, made)
    print(
        f"{out}: {made['samples']} samples of {made['shortest']:,} to {made['longest']:,} tokens. Next: let a model "
        f"answer them into `prediction`, then ultralong eval score {task} PREDICTIONS"
    )


def score(task: Positional[str], predictions: Positional[Path], /, *, json: Json = None) -> None:
    """Score a file of answers by the test's own rule.

    Each line is a sample of `ultralong eval make` with the model's `prediction`.

    Example: ultralong eval score ruler_vt answers.jsonl

    Args:
        task: Name of the test.
        predictions: File of JSON lines.
        json: Write the score as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Part, interval_text
    from ultralong.evaluation.runs.answer_files import score_file

    result = score_file(task, predictions)
    leave(json, result)
    part = Part(result["score"], result["n"], result.get("low"), result.get("high"))
    print(f"{result['task']}  {part.value:.1f}  [{interval_text(part)}]  n {part.n}")


def answer(
    model: Positional[str],
    /,
    *,
    tasks: tuple[str, ...],
    lengths: tuple[Tokens, ...],
    out: Path,
    samples: int = 20,
    seed: int = 0,
    haystack: Path | None = None,
    chunk: Tokens | None = None,
    gpus: int = 1,
    kv: Literal["auto", "fp8"] = "auto",
    batch: int | None = None,
    device: str = "auto",
    json: Json = None,
) -> None:
    """Let a model answer tests at several lengths, and score it.

    Stop it at any time; the same command resumes where it stopped.

    Examples:
      ultralong eval answer model --tasks niah_single_1 ruler_vt --lengths 4k 32k --out runs/ruler
      ultralong eval answer model --tasks niah_single_1 --lengths 1m --gpus 2 --kv fp8 --out runs/long

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
    from ultralong.evaluation.measures.result import Result, interval_text
    from ultralong.evaluation.runs.commands import answer as work
    from ultralong.inference.sharded_engine import with_model

    result = with_model(
        partial(work, tasks, lengths, samples, seed, out, haystack, chunk, batch),
        find_checkpoint(model),
        gpus=gpus,
        kv=kv,
        chunk=chunk,
        device=device,
    )
    if result is None:  # one of torchrun's other processes
        return
    leave(json, result)
    for found in (Result.from_dict(values) for values in result["results"]):
        for part in found.by_length:
            print(f"{found.task:24} {part.length:>9,}  {part.value:6.1f}  [{interval_text(part)}]  n {part.n}")


def compare(first: Positional[Path], second: Positional[Path], /, *, json: Json = None) -> None:
    """Compare two models on the same samples: differences test by test, with intervals.

    Example: ultralong eval compare runs/before runs/after

    Args:
        first: Folder that eval answer wrote for one model.
        second: The same for the other.
        json: Write the differences as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Part, interval_text
    from ultralong.evaluation.runs.compare import compare_answers

    rows = compare_answers(first, second)
    leave(json, rows)
    for row in rows:
        change = interval_text(Part(row["difference"], row["n"], row["low"], row["high"]), "{:+.1f}")
        print(
            f"{row['task']:24} {row['length']:>9,}  {row['first']:6.1f} -> {row['second']:6.1f}  "
            f"{row['difference']:+.1f}  [{change}]  n {row['n']}"
        )
