"""Commands over many tests at once: a run and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ultralong.cli.shared import Json, leave


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
    benchmarks: tuple[str, ...] = (),
    limit: int | None = None,
    run_code: bool = False,
    engine: Literal["transformers", "vllm"] = "transformers",
    gpus: int = 1,
    kv: Literal["auto", "fp8"] = "auto",
    batch: int | None = None,
    workers: int = 0,
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
      ultralong eval run ruler model --lengths 1048576 --gpus 2 --out runs/long

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
        data: Folder of published data (LV-Eval, InfiniteBench, SQuAD, HotpotQA, benchmarks), or package for what a
            registry has.
        rows: perplexity: folder of packed rows.
        max_rows: perplexity: rows to use.
        chat: Ask in the model's chat template, or not; by default where there is one.
        chunk: Tokens of one prefill pass.
        beyond_window: Ask also at lengths beyond the model's window.
        skip_missing: Leave out tests whose data is missing.
        benchmarks: standard: which; by default all (MMLU MMLU-Pro MATH GSM-8K HumanEval HellaSwag ARC-Easy
            ARC-Challenge PIQA).
        limit: standard: samples of each task, to try it out.
        run_code: standard: let HumanEval run what the model wrote, on this machine.
        engine: What answers: transformers, or vllm, which must be installed; the needle map and perplexity want
            transformers.
        gpus: GPUs that share a prompt (each holds the whole model and its part of the cache), or that vllm splits the
            model over.
        kv: Type of keys and values: auto, or fp8, which takes half the memory and rounds them to 8 bits.
        batch: Short prompts to answer together; by default as many as fit on a GPU, one on a CPU.
        workers: Processes that make samples ahead of the model.
        device: auto, cpu or cuda.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.runs.run import RunSettings
    from ultralong.evaluation.runs.run import run as measure

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
        benchmarks=benchmarks,
        limit=limit,
        run_code=run_code,
        engine=engine,
        gpus=gpus,
        kv_dtype=kv,
        batch=batch,
        workers=workers,
        **{key: None if value is None else str(value) for key, value in words.items()},
    )
    result = measure(wanted, out, before=before, device=device)
    if result is None:  # one of torchrun's other processes
        return
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
    from ultralong.evaluation.runs.results import write_results

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
    for item in (result["standard"] or {}).get("scores", ()):
        print(f"{item['task']:20} {item['score']:16.2f}  n {item['n']}")
    print(f"{out / 'report.html'}")
