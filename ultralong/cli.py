"""The command line: one function a command, each a thin layer over the library.

A command's signature is its options (read by tyro) and its docstring is its help. Modules are imported inside the
commands, so that `ultralong --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from ultralong import __version__

Json = Annotated[Path | None, arg(metavar="FILE", help="Write the numbers as JSON to this file.")]


def extend(
    source: Positional[str],
    /,
    *,
    to: int,
    out: Path,
    method: str = "auto",
    factor: float | None = None,
    attention_factor: float | None = None,
    original_window: int | None = None,
    theta: float | None = None,
    revision: str | None = None,
    json: Json = None,
) -> None:
    """Write a copy of a checkpoint whose window is longer: RoPE rescaled in one step, weights untouched.

    The copy opens in transformers and vLLM by its config alone. Train it on packed rows afterwards (ultralong pack,
    ultralong train).

    Example: ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1048576 --out llama-1m

    Args:
        source: Checkpoint folder with safetensors weights, or a hub id.
        to: Tokens of the new window, for example 1048576.
        out: Folder to write; it must be empty or not exist.
        method: auto keeps a model's llama3 scaling and gives any other yarn; or linear, ntk, dynamic, yarn, llama3.
        factor: Scaling factor; by default the new window over the window of the unscaled pretraining.
        attention_factor: Factor on cos and sin; 1.0 switches YaRN's temperature off.
        original_window: Window of the unscaled pretraining, where the config does not tell.
        theta: Another RoPE base.
        revision: Branch, tag or commit of a hub model.
        json: Write the report as JSON to this file.
    """
    from ultralong.extend import extend as run

    report = run(
        source,
        to,
        out,
        method,
        factor=factor,
        attention_factor=attention_factor,
        original_window=original_window,
        theta=theta,
        revision=revision,
    )
    _write(json, report.to_dict())
    print(
        f"{out}: window {report.old_window:,} -> {report.new_window:,} tokens ({report.method}, factor "
        f"{report.factor:g}). Next: ultralong pack RECIPE --tokenizer {out} --length {to} --out rows"
    )


def train(
    config: Positional[str],
    /,
    *,
    set: tuple[str, ...] = (),
    resume: bool = False,
    processes: int | None = None,
    json: Json = None,
) -> None:
    """Train on packed rows: continued pretraining, or SFT on rows packed from conversations.

    CONFIG is a preset's name or a YAML file; any of its keys can be changed with --set. The run's folder gets
    config.yaml (every setting), log.jsonl (a line a step), checkpoints/ and, at the end, model/.

    Examples:
      ultralong train tiny-cpu --set model=extended data='[{rows: rows}]' out=runs/cpt
      ultralong train runs/cpt/config.yaml --resume
      torchrun --nproc-per-node 8 -m ultralong train my.yaml --set parallel.sequence=8

    Args:
        config: Name of a preset, or a YAML file.
        set: key=value, with dots for groups: optimizer.lr=1e-5.
        resume: Go on from the newest checkpoint of the run's folder.
        processes: Start this many processes on this machine; without it the run uses this one, or torchrun's.
        json: Write the result as JSON to this file.
    """
    import dataclasses

    from ultralong import settings
    from ultralong.training.config import TrainConfig, preset

    resolved = settings.load(TrainConfig, preset(config), set)
    if processes is not None:
        import tempfile

        from ultralong.training.start import start

        with tempfile.TemporaryDirectory() as scratch:
            settings.save(resolved, Path(scratch) / "config.yaml")
            start(Path(scratch) / "config.yaml", processes, resume)
        return
    from ultralong.training.loop import train as run

    result = run(resolved, resume)
    _write(json, dataclasses.asdict(result))
    if _is_main():
        print(
            f"{result.model}: {result.steps:,} steps, {result.tokens:,} tokens, loss {result.loss:.4f}. "
            f"Next: ultralong eval needle {result.model} --lengths 4096 8192"
        )


def pack(
    recipe: Positional[str],
    /,
    *,
    tokenizer: str,
    length: int,
    out: Path,
    limit: int | None = None,
    json: Json = None,
) -> None:
    """Turn documents into rows of exactly LENGTH tokens: read, sample by length, tokenise, join by the separator.

    Stop it at any time; the same command goes on where it was. RECIPE says which documents, from where, under which
    licence, and how they are sampled and joined: see data_recipes/README.md.

    Example: ultralong pack data_recipes/tiny.yaml --tokenizer llama-1m --length 1048576 --out rows

    Args:
        recipe: A recipe's name or its YAML file.
        tokenizer: Folder or hub id of the model whose tokenizer is used.
        length: Tokens of a row.
        out: Folder to write the rows into.
        limit: Stop after about this many tokens, to try a recipe out.
        json: Write the report as JSON to this file.
    """
    from transformers import AutoTokenizer

    from ultralong.data.recipe import pack_recipe

    report = pack_recipe(recipe, AutoTokenizer.from_pretrained(tokenizer), length, out, limit=limit)
    _write(json, report.to_dict())
    print(report)


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
    _write(json, result)


def demo(
    *,
    model: str = "miniature",
    set: tuple[str, ...] = (),
    out: Path = Path("runs/demo"),
    seed: int | None = None,
    json: Json = None,
) -> None:
    """The whole recipe in miniature, on real input, in minutes: a model's window grows eightfold and the page shows it.

    Documents, tokens, separator-packed rows, RoPE rescaled in one step, continued pretraining on two sequence-parallel
    processes, short SFT, needle grid and perplexity before and after, a checkpoint that plain transformers opens.

    Args:
        model: miniature (a small model that ships with the package) or smollm2 (SmolLM2-135M-Instruct; wants a GPU).
        set: key=value changes of the demo's settings, such as target=8192.
        out: Folder of everything that is made; the page is report.html.
        seed: Seed of documents' order, questions and needles.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.demo import load, run

    changes = (*set, *(() if seed is None else (f"seed={seed}",)))
    report = run(load(model, changes), out)
    _write(json, report)
    print(f"Open {out / 'report.html'} in a browser. The model is in {report['checkpoint']}.")


COMMANDS: dict[str, Callable[..., None]] = {
    "extend": extend,
    "pack": pack,
    "train": train,
    "sft": train,
    "eval": evaluate,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (the command failed) or 2 (the line was not understood)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] == "--version":
        print(__version__)
        sys.exit(0)
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        print(f"ultralong: unknown command {words[0]!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    _run(name, words[len(name.split()) :])


def overview() -> str:
    """What `ultralong --help` prints: the commands with their first lines."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"ultralong {__version__}: extend a language model's window to millions of tokens.",
            "",
            "usage: ultralong COMMAND ...    (ultralong COMMAND --help explains a command)",
            "",
            *lines,
            "",
            "Start with: ultralong demo",
        ]
    )


def _run(name: str, words: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    try:
        tyro.cli(COMMANDS[name], prog=f"ultralong {name}", args=words, description=_explanation(COMMANDS[name]))
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"ultralong {name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"ultralong {name}: stopped.", file=sys.stderr)
        sys.exit(130)


def _explanation(command: Callable[..., None]) -> str:
    """The docstring without its list of arguments, which tyro shows beside the options."""
    return inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0].strip()


def _write(path: Path | None, value: Any) -> None:
    if path is not None and _is_main():
        from ultralong.files import write_json

        write_json(path, value)


def _is_main() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0
