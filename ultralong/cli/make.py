"""Commands that make something: a longer window, rows, a trained model, the demo.

A command's docstring is its help. Its options are those of the function of the public API that does the work, which it
gets with their values (`takes`), and what it has beside them. Modules are imported inside the commands, so that
`ultralong --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, is_main, leave, quoted, resumable
from ultralong.utils.processes import without_collections

if TYPE_CHECKING:
    from ultralong.checkpoints.extend import ExtendReport
    from ultralong.checkpoints.gguf import GgufExport
    from ultralong.data.recipe.build import PackReport
    from ultralong.training import TrainResult


@takes(work=Group("ultralong.api.make:extend", positional=("model",)))
def extend(work: partial[ExtendReport], *, json: Json = None) -> None:
    """Write a copy of a checkpoint with a longer window: RoPE rescaled, weights untouched.

    The copy opens in transformers and vLLM by its config alone. Train it on packed rows afterwards (ultralong pack,
    ultralong train).

    Examples:
      ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1m --out llama-1m
      ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1m --explain

    Args:
        work: The function, with what is extended and how.
        json: Write the report as JSON to this file.
    """
    report, out = work(), work.keywords["out"]
    leave(json, report.to_dict())
    if work.keywords["beta"] is not None and report.method not in ("yarn", "llama3"):
        print(f"note: --beta changes nothing: {report.method} has no ramp, only yarn and llama3 have one.")
    if report.explanation is not None:
        print("\n".join([*report.explanation["lines"], *(f"note: {note}" for note in report.notes)]))
        return
    print(
        f"{out}: window {report.old_window:,} -> {report.new_window:,} tokens ({report.method}, factor "
        f"{report.factor:g}). Next: ultralong pack RECIPE --tokenizer {quoted(out)} --length {report.new_window} "
        "--out rows"
    )
    for note in report.notes:
        print(f"note: {note}")


@takes(work=Group("ultralong.api.make:pack", positional=("recipe",), names={"changes": "set"}))
def pack(work: partial[PackReport], *, json: Json = None) -> None:
    """Turn documents into rows of exactly LENGTH tokens: read, sample, tokenise, join.

    Stop it at any time; the same command resumes where it stopped. RECIPE says which documents, from where, under which
    licence, and how they are sampled and joined: see data_recipes/README.md.

    Example: ultralong pack data_recipes/tiny.yaml --tokenizer llama-1m --length 1m --out rows

    Args:
        work: The function, with what is packed and how.
        json: Write the report as JSON to this file.
    """
    with resumable(work.keywords["out"]):
        report = work()
    leave(json, report.to_dict())
    print(report)


@takes(work=Group("ultralong.api.runs:train", positional=("config",), names={"changes": "set"}))
def train(work: partial[TrainResult], *, json: Json = None) -> None:
    """Train on packed rows: continued pretraining on whole documents.

    CONFIG is a preset's name or a YAML file; any of its keys can be changed with --set. The run's folder gets
    config.yaml (every setting), log.jsonl (a line a step), checkpoints/ and, at the end, model/. With lora.rank above 0
    the weights are frozen and LoRA adapters are trained, which the run leaves in adapter/.

    With parallel.dynamic_context_parallel=auto and parallel.context_parallel_size=auto the planner decides at the start
    how rows are shared over the GPUs, and says why: dynamic sharing, or a fixed degree. A resumed run keeps that.

    Examples:
      ultralong train tiny-cpu --set model=extended data='[{rows: rows}]' out=runs/cpt
      ultralong train runs/cpt/config.yaml --resume
      ultralong train my.yaml --set lora.rank=8 lora.train_embeddings=true lora.train_norms=true
      torchrun --nproc-per-node 8 -m ultralong train my.yaml --set parallel.context_parallel_size=8

    Args:
        work: The function, with its config.
        json: Write the result as JSON to this file.
    """
    _tell(work(), json)


@takes(work=Group("ultralong.api.runs:sft", positional=("config",), names={"changes": "set"}))
def sft(work: partial[TrainResult], *, json: Json = None) -> None:
    """Train on the answers of conversations (SFT), on rows packed from a recipe of chat.

    The same loop as train. Rows of documents are refused, because each of their tokens is a target. The paper's SFT:
    learning rate 5e-6, 128 examples a step, nothing above 8K tokens.

    Example: ultralong sft sft.yaml --set data='[{rows: chat-rows}]' optimizer.lr=5e-6

    Args:
        work: The function, with its config.
        json: Write the result as JSON to this file.
    """
    _tell(work(), json)


def _tell(result: TrainResult, json: Path | None) -> None:
    """What train and sft report."""
    import dataclasses
    import math

    from transformers import AutoConfig

    from ultralong.rope import declared_window
    from ultralong.training.adapters.config import is_adapter

    loss = None if math.isnan(result.loss) else result.loss  # where no step was left to do
    leave(json, {**dataclasses.asdict(result), "loss": loss})
    if is_main():
        if is_adapter(result.model):
            next_ = f"ultralong merge {quoted(result.model)} --out MERGED"
        else:
            # The whole window, for which it was trained, and a quarter, for whether short prompts still do.
            window = declared_window(AutoConfig.from_pretrained(result.model).get_text_config())
            lengths = f" --lengths {window // 4} {window}" if window else ""
            next_ = f"ultralong eval needle {quoted(result.model)}{lengths}"
        print(
            f"{result.model}: {result.steps:,} step{'s' * (result.steps != 1)}, {result.tokens:,} tokens, loss "
            f"{'none' if loss is None else f'{loss:.4f}'}. Next: {next_}"
        )


def demo(
    *,
    model: str = "miniature",
    set: tuple[str, ...] = (),
    out: Path = Path("runs/demo"),
    seed: int | None = None,
    json: Json = None,
) -> None:
    """Run all steps in minutes on a small model: its window grows eightfold, and a page shows it.

    Documents, tokens, separator-packed rows, RoPE rescaled in one step, continued pretraining on two sequence-parallel
    processes, short SFT, needle grid and perplexity before and after, a checkpoint that plain transformers opens.

    Example: ultralong demo --out runs/demo

    Args:
        model: miniature (a small model that ships with the package) or smollm2 (SmolLM2-135M-Instruct; needs a GPU).
        set: Changes of the demo's settings, such as target=8192.
        out: Folder of everything that is made; the page is report.html.
        seed: Seed of documents' order, questions and needles.
        json: Write the report's numbers as JSON to this file.
    """
    with without_collections():
        from ultralong.demo import load, run

    changes = (*set, *(() if seed is None else (f"seed={seed}",)))
    with resumable(out):
        report = run(load(model, changes), out)
    leave(json, report)
    print(f"Open {out / 'report.html'} in a browser. The model is in {report['checkpoint']}.")


@takes(work=Group("ultralong.api.make:export_gguf", positional=("checkpoint", "out")))
def export_gguf(work: partial[GgufExport], *, json: Json = None) -> None:
    """Write a checkpoint as one GGUF file for llama.cpp, and say which options read its window right.

    llama.cpp's own converter does it, from a folder with llama.cpp's sources; without one, the message says how to get
    it. What llama.cpp cannot apply, such as a temperature of YaRN that is not its own, is refused.

    Example: ultralong export gguf runs/cpt/model model.gguf --llama-cpp llama.cpp

    Args:
        work: The function, with the checkpoint and the file.
        json: Write the file's facts and the options as JSON to this file.
    """
    made = work()
    leave(json, made.to_dict())
    words = shlex.join(["llama-server", "-m", made.file, "-c", str(made.window), *made.options])
    print(f"Wrote {made.file} ({made.architecture}, window {made.window:,}). To serve it: {words}")
