"""Commands over many tests at once: a run and its report."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, resumable
from ultralong.utils.hub import find_checkpoint

if TYPE_CHECKING:
    from ultralong.evaluation.runs.settings import RunSettings
    from ultralong.search.settings import SearchSettings


@takes(
    wanted=Group(
        "ultralong.evaluation.runs.settings:RunSettings",
        positional=("tasks", "model"),
        names={"kv_dtype": "kv"},
        commas=("tasks",),
    ),
    work=Group("ultralong.api.measure:evaluate", left_out=("model", "tasks", "quiet")),
)
def run(wanted: RunSettings, work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Measure a model on any of the tests, and write a report: JSON and one page.

    Stop it at any time; the same command resumes where it stopped.

    Tests are named with commas between them; groups are ruler, niah, infinitebench, infinitebench_synthetic,
    infinitebench_published, longbench (v2, Pro), lveval, lveval_16k to lveval_256k, babilong_style, nonliteral,
    reported (graphwalks, json_kv, mrcr_style and oolong_style, which can be named alone), needle (the map), perplexity,
    longppl, loss and lm_eval (short benchmarks). The path of a .jsonl file is a test of its questions, one a line:
    question, answers, and where wanted context or context_file, id, category, all.

    Examples:
      ultralong eval run needle,ruler,babilong_style model --lengths 4k 32k 128k --samples 50 --out runs/model
      ultralong eval run lveval,infinitebench model --lengths 128k --data published --out runs/model
      ultralong eval run ruler model --lengths 1m --gpus 2 --out runs/long
      ultralong eval run reported model --lengths 4k 8k 16k 32k 64k --samples 20 --out runs/reported
      ultralong eval run questions.jsonl model --lengths 4k 32k --samples 500 --out runs/own

    Args:
        wanted: What to measure.
        work: The function, with where and beside what.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.runs.run import run as measure

    wanted = replace(wanted, model=find_checkpoint(wanted.model))
    with resumable(work.keywords["out"]):
        result = measure(wanted, **work.keywords, draw=False)
    if result is None:  # one of torchrun's other processes
        return
    leave(json, result)
    _tell(result, work.keywords["out"])


@takes(work=Group("ultralong.api.answers:longppl", positional=("model",)))
def longppl(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Measure perplexity over the tokens that need the long context (LongPPL).

    Key tokens are those whose log-likelihood the whole text raises over a short context, by more than --key-alpha and
    to above --key-beta; the paper's thresholds are the defaults. To compare models, let one evaluator choose for all:
    a model that reads this far well.

    Examples:
      ultralong eval longppl model --rows rows --evaluator long-model
      ultralong eval longppl model --rows rows-1m --evaluator long-model --gpus 8

    Args:
        work: The function, with the model and the rows.
        json: Write the numbers as JSON to this file.
    """
    from ultralong.evaluation.measures.result import Result
    from ultralong.evaluation.report.table import longppl_lines

    found = work()
    leave(json, found)
    print("\n".join(longppl_lines(Result.from_dict(found["result"]), work.keywords["model"])))
    if work.keywords["evaluator"] is None:
        print("Another model's LongPPL compares with this one on the same key tokens: --evaluator MODEL for both.")


def report(folder: Positional[Path], /, *, before: Path | None = None, json: Json = None) -> None:
    """Write the report of a run again from its answers, without the model.

    With --before, two models side by side.

    Example: ultralong eval report runs/after --before runs/before

    Args:
        folder: Folder that eval run wrote.
        before: The same for the model before.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.runs.results import write_results

    result = write_results(folder, before, draw=False)
    if not result["results"] and not result["skipped"]:
        raise ValueError(f"{folder} holds no answers yet: repeat its `ultralong eval run`, which goes on from there.")
    leave(json, result)
    _tell(result, folder)


@takes(work=Group("ultralong.api.runs:ablate", positional=("study",), names={"changes": "set"}))
def ablate(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Compare ways to extend a model: arms that differ from one base, on the same samples.

    STUDY is one YAML file: the base, the arms with the keys that they change, the training seeds, and for each arm
    a hypothesis with the number that refutes it. Write your own from one that ships or from the example in
    ultralong/ablation/README.md; --dry-run says what is wrong in it. An arm rescales, continues pretraining, and
    with the group sft ends with SFT on conversations; training.steps: 0 leaves pretraining out. What arms share is
    built once. Stop it at any time; the same command resumes where it stopped, and one with more arms or seeds adds
    them. Several calls may work in one folder at once, such as one on each GPU (CUDA_VISIBLE_DEVICES): each takes
    what no other works on. The folder gets results.json and a page with forest plots.

    Examples:
      ultralong ablate miniature --out study
      ultralong ablate smollm2-135m-64k --dry-run --price 2.5

    Args:
        work: The function, with the study.
        json: Write the result as JSON to this file.
    """
    from ultralong.ablation.page import table_lines
    from ultralong.ablation.price import price_lines

    with resumable(work.keywords["out"]) if not work.keywords["dry_run"] else nullcontext():
        found = work()
    page = f"{work.keywords['out']}/report.html"
    leave(json, found)
    print("\n".join(price_lines(found) if work.keywords["dry_run"] else [*table_lines(found), page]))


@takes(wanted=Group("ultralong.search.settings:SearchSettings", positional=("model",)))
def search(
    wanted: SearchSettings,
    *,
    out: Path,
    write: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Search the scaling of a longer window before training, in minutes.

    Every candidate is scored on tokens that need the long context: the answers of hidden needles, and with --rows and
    --evaluator the key tokens of LongPPL. Known methods are tried with several factors, ramps and temperatures;
    longrope evolves a factor for each rotary pair as LongRoPE2 does. With --train the best are trained for a few steps
    too. Stop it at any time; the same command resumes where it stopped.

    Examples:
      ultralong search model --to 64k --out search
      ultralong search model --to 64k --haystack books --train smollm2-135m-64k --out trained --write model-64k

    Args:
        wanted: What to try, and on what it is scored.
        out: Folder of the search: trials, results.json.
        write: Write the model with the best scaling to this folder.
        device: auto, cpu or cuda.
        quiet: No progress bars.
        json: Write the results as JSON to this file.
    """
    from ultralong.search.run import search as work
    from ultralong.search.run import table_lines
    from ultralong.search.run import write as write_best

    wanted = replace(wanted, model=find_checkpoint(wanted.model))
    with resumable(out):
        found = work(wanted, out, device=device, quiet=quiet)
    leave(json, found)
    print("\n".join(table_lines(found)))
    if write is None:
        print(
            f"{out / 'results.json'}. To write the model with the best scaling: the same command with --write FOLDER."
        )
        return
    write_best(wanted, found["best"], write)
    print(f"{write}: {found['best']['method']} scaling to {wanted.to:,} tokens. Next: ultralong pack, ultralong train.")


def _tell(result: dict[str, Any], out: Path) -> None:
    from ultralong.evaluation.report.table import table_lines
    from ultralong.evaluation.runs.results import draw_results

    print("\n".join(table_lines(result)), flush=True)  # before the page, which takes seconds
    print(f"{draw_results(out)}")
