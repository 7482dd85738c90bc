"""Commands that measure a model, and samples and answers of tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, resumable

UNPAIRED = {"the needle map": "needle.jsonl", "perplexity": "perplexity.json", "LongPPL": "longppl.json"}


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


@takes(work=Group("ultralong.api.answers:row_loss", positional=("model", "rows")))
def loss(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Measure the loss on packed rows as training does; on answers, in rows of conversations.

    The number is what a training step on these rows would log, with an interval over documents. With --before, a
    second model reads the same rows and the change is given with its own interval.

    Example: ultralong eval loss runs/sft/model answers --before runs/cpt/model

    Args:
        work: The function, with the model and the rows.
        json: Write the numbers as JSON to this file.
    """
    result, model, before = work(), work.keywords["model"], work.keywords["before"]
    leave(json, result)
    print(f"{model}: {_loss_line(result['result'])}")
    if before is not None:
        change = result["change"]
        print(f"{before}: {_loss_line(result['before']['result'])}")
        between = "" if change["low"] is None else f" [{change['low']:+.4f}, {change['high']:+.4f}]"
        print(f"change {change['change']:+.4f}{between}; the loss fell for {change['better']:.0%} of the documents")


def _loss_line(found: dict[str, Any]) -> str:
    from ultralong.evaluation.measures.result import Result, interval_text
    from ultralong.utils.units import many

    result = Result.from_dict(found)
    of = f"{many(result.n, 'target')} of {many(result.details['documents'], 'document')}"
    return f"{result.value:.4f} [{interval_text(result, '{:.4f}')}] nats per target, {of}"


@takes(work=Group("ultralong.api.answers:write_samples", positional=("task",)))
def make_samples(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Write samples of a test to a file, for a model that runs elsewhere.

    Tests are RULER's, InfiniteBench's, LV-Eval's, GraphWalks (graphwalks_bfs, graphwalks_parents), HELMET's json_kv,
    MRCR-style (mrcr_style_2needles, _4needles, _8needles), OOLONG-style (oolong_style_counting, _user, _timeline),
    BABILong-style and non-literal questions, needles, and the path of a .jsonl file of questions.

    Example: ultralong eval make ruler_vt --length 128k --samples 20 --tokenizer model --out vt.jsonl

    Args:
        work: The function, with the test and the file.
        json: Write what was made as JSON to this file.
    """
    made = work()
    leave(json, made)
    print(
        f"{work.keywords['out']}: {made['samples']} samples of {made['shortest']:,} to {made['longest']:,} tokens. "
        f"Next: let a model answer them into `prediction`, then ultralong eval score {made['task']} PREDICTIONS"
    )


def score(task: Positional[str], predictions: Positional[Path], /, *, json: Json = None) -> None:
    """Score a file of answers by the test's own rule, over all and by length.

    Each line is a sample of `ultralong eval make` with the model's `prediction`; several lengths in one file (joined by
    cat) give the area under their curve too.

    Example: ultralong eval score ruler_vt answers.jsonl

    Args:
        task: Name of the test, or the path of its file of questions.
        predictions: File of JSON lines.
        json: Write the score as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Part, interval_text
    from ultralong.evaluation.report.table import area_text
    from ultralong.evaluation.runs.answer_files import score_file

    result = score_file(task, predictions)
    leave(json, result)
    part = Part(result["score"], result["n"], result.get("low"), result.get("high"))
    print(f"{result['task']}  {part.value:.1f}  [{interval_text(part)}]  n {part.n}  ({result['capability']})")
    for part in (Part(**values) for values in result.get("by_length", ()) if len(result["by_length"]) > 1):
        print(f"{part.length or 0:>11,}  {part.value:6.1f}  [{interval_text(part)}]  n {part.n}")
    for area in result["areas"]:
        print(f"area under the curve  {area_text(area)}")


@takes(work=Group("ultralong.api.answers:answer", positional=("model",)))
def answer(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Let a model answer tests at several lengths, and score it.

    Stop it at any time; the same command resumes where it stopped.

    Examples:
      ultralong eval answer model --tasks niah_single_1 ruler_vt --lengths 4k 32k --out runs/ruler
      ultralong eval answer model --tasks niah_single_1 --lengths 1m --gpus 2 --kv fp8 --out runs/long

    Args:
        work: The function, with the model and the tests.
        json: Write the scores as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Result, interval_text

    with resumable(work.keywords["out"]):
        result = work()
    if not result:  # one of torchrun's other processes
        return
    leave(json, result)
    for found in (Result.from_dict(values) for values in result["results"]):
        for part in found.by_length:
            print(f"{found.task:24} {part.length:>9,}  {part.value:6.1f}  [{interval_text(part)}]  n {part.n}")


def compare(first: Positional[Path], second: Positional[Path], /, *, json: Json = None) -> None:
    """Compare two models on the same samples: differences by test or short benchmark, with intervals.

    Example: ultralong eval compare runs/before runs/after

    Args:
        first: Folder that eval run or eval answer wrote for one model.
        second: The same for the other.
        json: Write the differences as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Part, interval_text
    from ultralong.evaluation.runs.compare import compare_answers

    rows = compare_answers(first, second)
    both = [name for name, file in UNPAIRED.items() if (first / file).exists() and (second / file).exists()]
    leave(json, rows)
    for row in rows:
        length = "" if row["length"] is None else f"{row['length']:,}"
        change = interval_text(Part(row["difference"], row["n"], row["low"], row["high"]), "{:+.1f}")
        print(
            f"{row['task']:24} {length:>9}  {row['first']:6.1f} -> {row['second']:6.1f}  "
            f"{row['difference']:+.1f}  [{change}]  n {row['n']}"
        )
    if both:
        print(f"note: not compared here: {' and '.join(both)}. Each report has its own; ultralong ablate pairs them.")
