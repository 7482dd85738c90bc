"""The short benchmarks, through lm-evaluation-harness: has the model kept what it could do before its window grew?

Prompts, few-shot examples and scores are lm-eval's own. Each benchmark runs in a process of its own, whose working
folder holds local copies of the data under the hub's names: `datasets` takes a folder of that name before it asks the
hub, so the same command runs with and without a network, and nothing of lm-eval is changed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ultralong.evaluation.measures.lm_eval_data import MATH_SUBJECTS, local_folder
from ultralong.evaluation.measures.lm_eval_samples import read_outcomes
from ultralong.evaluation.measures.result import Result, benchmark_result
from ultralong.utils.extras import require
from ultralong.utils.files import read_json, write_json, write_text
from ultralong.utils.progress import progress

LAST_LINES = 3


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as it is asked.

    Attributes:
        name: As the paper's table names it.
        tasks: lm-eval's tasks; several are joined by their numbers of samples.
        metric: lm-eval's metric and filter.
        shots: Worked examples; None takes the task's own number.
        chat: Whether it is asked in the model's chat template, worked examples as turns. Benchmarks that compare the
            likelihood of endings are asked plainly.
        runs_code: Whether scoring runs what the model wrote.
    """

    name: str
    tasks: tuple[str, ...]
    metric: str
    shots: int | None = None
    chat: bool = True
    runs_code: bool = False


# The paper's five (MMLU and MMLU-Pro with 5 examples, MATH 0, GSM-8K 8, HumanEval 0), then four more. The tasks are
# those that lm-eval keeps for Llama-3 Instruct; the paper does not say which prompts it used.
BENCHMARKS = {
    item.name: item
    for item in (
        Benchmark("MMLU", ("mmlu_llama",), "exact_match,strict_match"),
        Benchmark("MMLU-Pro", ("mmlu_pro_llama",), "exact_match,strict_match"),
        Benchmark("MATH", tuple(f"minerva_math_{subject}" for subject in MATH_SUBJECTS), "math_verify,none", shots=0),
        Benchmark("GSM-8K", ("gsm8k_llama",), "exact_match,flexible_extract"),
        Benchmark("HumanEval", ("humaneval_instruct",), "pass@1,create_test", runs_code=True),
        Benchmark("HellaSwag", ("hellaswag",), "acc_norm,none", shots=0, chat=False),
        Benchmark("ARC-Easy", ("arc_easy",), "acc_norm,none", shots=0, chat=False),
        Benchmark("ARC-Challenge", ("arc_challenge",), "acc_norm,none", shots=0, chat=False),
        Benchmark("PIQA", ("piqa",), "acc_norm,none", shots=0, chat=False),
    )
}


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name, letter case aside; all of them for none.

    Raises:
        ValueError: There is none of that name.
    """
    known = {name.lower(): item for name, item in BENCHMARKS.items()}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise ValueError(f"There is no short benchmark {unknown[0]!r}. There are: {', '.join(BENCHMARKS)}.")
    return [known[name.lower()] for name in names] or list(BENCHMARKS.values())


def command_for(
    benchmark: Benchmark,
    model: str,
    out: Path,
    *,
    device: str,
    chat: bool,
    batch: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
) -> list[str]:
    """The command line that runs one benchmark.

    Args:
        benchmark: Which.
        model: Folder (absolute) or hub id.
        out: Folder for lm-eval's results.
        device: cpu or cuda.
        chat: Whether the tokenizer has a chat template.
        batch: Samples to ask together; None takes one on a CPU, and what lm-eval finds by trying on a GPU.
        limit: Samples of each of its tasks; None takes all.
        include: Folder of further lm-eval tasks.
    """
    dtype = "float32" if device == "cpu" else "auto"
    words = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={_plain_value(model)},dtype={dtype}",
        "--tasks",
        ",".join(benchmark.tasks),
        "--device",
        device,
        "--batch_size",
        str(batch) if batch is not None else "1" if device == "cpu" else "auto",
        "--output_path",
        str(out),
        "--log_samples",
    ]
    if benchmark.shots is not None:
        words += ["--num_fewshot", str(benchmark.shots)]
    if benchmark.chat and chat:
        words += ["--apply_chat_template", "--fewshot_as_multiturn"]
    if benchmark.runs_code:
        words += ["--confirm_run_unsafe_code"]
    if limit is not None:
        words += ["--limit", str(limit)]
    if include is not None:
        words += ["--include_path", str(include)]
    return words


def _plain_value(model: str) -> str:
    """A model's name where lm-eval reads `name=value` pairs: a comma in it would add arguments of its own.

    Raises:
        ValueError: It holds one.
    """
    if "," in model:
        raise ValueError(f"{model} holds a comma, at which lm-eval would cut the name: move or link the folder.")
    return model


def measure_lm_eval(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    chat: bool = True,
    batch: int | None = None,
    limit: int | None = None,
    run_code: bool = False,
    include: Path | None = None,
    quiet: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Run short benchmarks; those whose result is in the folder are not run again.

    Args:
        model: Folder or hub id.
        out: Folder for the score and the outcomes of the samples of each benchmark, `NAME.json` and `NAME.jsonl`.
        names: Benchmarks, as in `BENCHMARKS`; all for none.
        data: Folder with copies of the data under the hub's names, `package` for those that a package registry has, or
            None for the hub.
        device: cpu or cuda.
        chat: Whether the tokenizer has a chat template.
        batch: As for `command_for`.
        limit: Samples of each task; None takes all.
        run_code: HumanEval runs programs that the model wrote, on this machine, without a sandbox: only if True.
        include: Folder of further lm-eval tasks.
        quiet: True draws no progress bar.

    Returns:
        The results, and the reason of each benchmark left out.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: An unknown benchmark, or data that cannot be had.
    """
    chosen = find_benchmarks(names)
    require("lm_eval", "eval")
    out = Path(out).absolute()
    where = Path(model)
    named = str(where.absolute()) if where.exists() else str(model)
    folder = local_folder(data)
    skipped: dict[str, str] = {}
    results = []
    for item in progress(chosen, desc="short benchmarks", unit="benchmark", quiet=quiet):
        kept = out / f"{item.name}.json"
        if item.runs_code and not run_code:
            skipped[item.name] = "it runs programs that the model wrote; --run-code allows that"
            continue
        if not kept.exists():
            with tempfile.TemporaryDirectory() as scratch:
                words = command_for(
                    item, named, Path(scratch), device=device, chat=chat, batch=batch, limit=limit, include=include
                )
                reason = _call(words, folder or Path(scratch), offline=folder is not None)
                if reason is not None:
                    skipped[item.name] = reason
                    continue
                score = read_score(item, Path(scratch))
                outcomes = read_outcomes(item.tasks, item.metric, Path(scratch))
                write_text(kept.with_suffix(".jsonl"), "".join(f"{json.dumps(outcome)}\n" for outcome in outcomes))
                write_json(kept, score)  # last, as it says that the benchmark is done
        results.append(benchmark_result(read_json(kept)))
    return results, skipped


def lm_eval_version() -> str:
    """Version of the installed lm-eval; `unknown` where there is none."""
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return "unknown"


def _call(words: Sequence[str], folder: Path, *, offline: bool) -> str | None:
    """Run a command; None, or the end of what it said when it failed."""
    environment = os.environ | {"HF_ALLOW_CODE_EVAL": "1", "TOKENIZERS_PARALLELISM": "false"}
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:]) or f"lm-eval left with exit code {done.returncode}"


def read_score(benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """The score of one benchmark from the results that lm-eval wrote into a folder.

    Tasks count by their numbers of samples; their standard errors are independent.

    Raises:
        ValueError: There are no results, or they lack the metric.
    """
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"lm-eval wrote no results for {benchmark.name}.")
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    counts = {task: count["effective"] for task, count in found.get("n-samples", {}).items()}
    measured: dict[str, Mapping[str, Any]] = {task: found["results"].get(task, {}) for task in counts}
    if not counts or any(benchmark.metric not in values for values in measured.values()):
        raise ValueError(
            f"lm-eval's results for {benchmark.name} do not hold {benchmark.metric} for each of its "
            f"tasks: another version of lm-eval? This one is {lm_eval_version()}."
        )
    total = sum(counts.values())
    score = sum(count * measured[task][benchmark.metric] for task, count in counts.items()) / total
    name, _, filtered = benchmark.metric.partition(",")
    errors = [measured[task].get(f"{name}_stderr,{filtered}") for task in counts]
    stderr = None
    if all(isinstance(error, float) for error in errors):
        weighted = (count * error for count, error in zip(counts.values(), errors, strict=True))
        stderr = 100 * math.hypot(*weighted) / total
    return {
        "task": benchmark.name,
        "lm_eval": list(benchmark.tasks),
        "metric": benchmark.metric,
        "score": 100 * score,
        "stderr": stderr,
        "n": total,
    }
