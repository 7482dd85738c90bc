"""Commands that make something: a longer window, rows, a trained model, the demo.

A command's signature is its options (read by tyro) and its docstring is its help. Modules are imported inside the
commands, so that `ultralong --help` and a mistyped option answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ultralong.cli.shared import File, Json, is_main, leave
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.units import Tokens


def extend(
    model: Positional[str],
    /,
    *,
    to: str,
    out: Path | None = None,
    method: str = "auto",
    explain: bool = False,
    factor: float | None = None,
    attention_factor: float | None = None,
    original_window: Tokens | None = None,
    theta: float | None = None,
    beta: float | None = None,
    revision: str | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Write a copy of a checkpoint with a longer window: RoPE rescaled, weights untouched.

    The copy opens in transformers and vLLM by its config alone. Train it on packed rows afterwards (ultralong pack,
    ultralong train).

    Examples:
      ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1m --out llama-1m
      ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1m --explain

    Args:
        model: Checkpoint folder with safetensors weights, or a hub id.
        to: Tokens of the new window, such as 1048576 or 1m, or how many times the old one, such as 8x.
        out: Folder to write; it must be empty or not exist. Needed but with --explain.
        method: auto keeps a model's llama3 scaling and gives any other yarn; or linear, ntk, dynamic, yarn, llama3.
        explain: Write nothing and say which scaling this is, what it changes for which rotary pairs, and what the
            model's own design lets expect.
        factor: Scaling factor; by default the new window over the window of the unscaled pretraining.
        attention_factor: Factor on cos and sin; 1.0 switches YaRN's temperature off.
        original_window: Window of the unscaled pretraining, where the config does not tell.
        theta: Another RoPE base.
        beta: Turns within the original window above which a pair keeps its speed; by default the recipe's 4.
        revision: Branch, tag or commit of a hub model.
        quiet: No progress bar.
        json: Write the report as JSON to this file.
    """
    from ultralong.checkpoints.extend import extend as run

    report = run(
        model,
        to,
        out,
        method,
        explain=explain,
        factor=factor,
        attention_factor=attention_factor,
        original_window=original_window,
        theta=theta,
        beta=beta,
        revision=revision,
        quiet=quiet,
    )
    leave(json, report.to_dict())
    if report.explanation is not None:
        print("\n".join([*report.explanation["lines"], *(f"note: {note}" for note in report.notes)]))
        return
    print(
        f"{out}: window {report.old_window:,} -> {report.new_window:,} tokens ({report.method}, factor "
        f"{report.factor:g}). Next: ultralong pack RECIPE --tokenizer {out} --length {report.new_window} --out rows"
    )


def pack(
    recipe: Positional[str],
    /,
    *,
    tokenizer: str,
    length: Tokens,
    out: Path,
    limit: Tokens | None = None,
    workers: int = 1,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Turn documents into rows of exactly LENGTH tokens: read, sample, tokenise, join.

    Stop it at any time; the same command resumes where it stopped. RECIPE says which documents, from where, under which
    licence, and how they are sampled and joined: see data_recipes/README.md.

    Example: ultralong pack data_recipes/tiny.yaml --tokenizer llama-1m --length 1m --out rows

    Args:
        recipe: A recipe's name or its YAML file.
        tokenizer: Folder or hub id of the model whose tokenizer is used.
        length: Tokens of a row.
        out: Folder to write the rows into.
        limit: Stop after about this many tokens, to try a recipe out.
        workers: Processes that tokenise.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    from ultralong.data.recipe.build import pack_recipe

    report = pack_recipe(recipe, load_tokenizer(tokenizer), length, out, limit=limit, workers=workers, quiet=quiet)
    leave(json, report.to_dict())
    print(report)


def train(
    config: Positional[str],
    /,
    *,
    set: tuple[str, ...] = (),
    resume: bool = False,
    processes: int | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Train on packed rows: continued pretraining on whole documents.

    CONFIG is a preset's name or a YAML file; any of its keys can be changed with --set. The run's folder gets
    config.yaml (every setting), log.jsonl (a line a step), checkpoints/ and, at the end, model/.

    Examples:
      ultralong train tiny-cpu --set model=extended data='[{rows: rows}]' out=runs/cpt
      ultralong train runs/cpt/config.yaml --resume
      torchrun --nproc-per-node 8 -m ultralong train my.yaml --set parallel.context_parallel_size=8

    Args:
        config: Name of a preset, or a YAML file.
        set: Changes of the config, with dots for groups, such as optimizer.lr=1e-5.
        resume: Resume from the newest checkpoint of the run's folder.
        processes: Start this many processes on this machine; without it the run uses this one, or torchrun's.
        quiet: No progress bar.
        json: Write the result as JSON to this file.
    """
    _train("train", config, set, resume, processes, quiet, json)


def sft(
    config: Positional[str],
    /,
    *,
    set: tuple[str, ...] = (),
    resume: bool = False,
    processes: int | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Train on the answers of conversations (SFT), on rows packed from a recipe of chat.

    The same loop as train. Rows of documents are refused, as every token of theirs is a target. The paper's SFT:
    learning rate 5e-6, 128 examples a step, nothing above 8K tokens.

    Example: ultralong sft sft.yaml --set data='[{rows: chat-rows}]' optimizer.lr=5e-6

    Args:
        config: Name of a preset, or a YAML file.
        set: Changes of the config, with dots for groups, such as optimizer.lr=1e-5.
        resume: Resume from the newest checkpoint of the run's folder.
        processes: Start this many processes on this machine; without it the run uses this one, or torchrun's.
        quiet: No progress bar.
        json: Write the result as JSON to this file.
    """
    _train("sft", config, set, resume, processes, quiet, json)


def _train(
    command: str,
    config: str,
    changes: tuple[str, ...],
    resume: bool,
    processes: int | None,
    quiet: bool,
    json: Path | None,
) -> None:
    """What train and sft share: here, in processes of this machine, or in torchrun's."""
    import dataclasses

    from ultralong.training.config import TrainConfig, preset
    from ultralong.utils import settings
    from ultralong.utils.files import read_json

    resolved = settings.load(TrainConfig, preset(config), changes)
    if processes is not None:
        import tempfile

        from ultralong.launch.local import launch_local

        with tempfile.TemporaryDirectory() as scratch:
            settings.save(resolved, Path(scratch) / "config.yaml")
            launch_local(Path(scratch) / "config.yaml", processes, resume, quiet, command)
        result = read_json(Path(resolved.out) / "result.json")
    else:
        from ultralong.training.loop import train as run

        result = dataclasses.asdict(run(resolved, resume, quiet, answers=command == "sft"))
    leave(json, result)
    if is_main():
        loss = "none" if result["loss"] is None else f"{result['loss']:.4f}"  # where no step was left to do
        print(
            f"{result['model']}: {result['steps']:,} steps, {result['tokens']:,} tokens, loss {loss}. "
            f"Next: ultralong eval needle {result['model']} --lengths 4096 8192"
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
    from ultralong.demo import load, run

    changes = (*set, *(() if seed is None else (f"seed={seed}",)))
    report = run(load(model, changes), out)
    leave(json, report)
    print(f"Open {out / 'report.html'} in a browser. The model is in {report['checkpoint']}.")


def export_gguf(
    checkpoint: Positional[Path],
    out: Positional[File],
    /,
    *,
    llama_cpp: Path | None = None,
    dtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto",
    json: Json = None,
) -> None:
    """Write a checkpoint as one GGUF file for llama.cpp, and say which options read its window right.

    llama.cpp's own converter does it, from a folder with llama.cpp's sources; without one, the message says how to get
    it. What llama.cpp cannot apply, such as a temperature of YaRN that is not its own, is refused.

    Example: ultralong export gguf runs/cpt/model model.gguf --llama-cpp llama.cpp

    Args:
        checkpoint: Checkpoint folder with safetensors weights.
        out: The file to write.
        llama_cpp: Folder of llama.cpp's sources.
        dtype: Type of the weights in the file; auto keeps the checkpoint's.
        json: Write the file's facts and the options as JSON to this file.
    """
    from ultralong.checkpoints.gguf import export_gguf as run

    made = run(checkpoint, out, llama_cpp, dtype)
    leave(json, made.to_dict())
    words = " ".join(["llama-server", "-m", made.file, "-c", str(made.window), *made.options])
    print(f"Wrote {made.file} ({made.architecture}, window {made.window:,}). To serve it: {words}")
