"""The command line: one function a command, each a thin layer over the library."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import tyro

from ultralong import __version__
from ultralong.cli import course, data, texts
from ultralong.cli.bench import bench_attention, bench_compare, bench_prefill, bench_train
from ultralong.cli.cluster import launch, plan
from ultralong.cli.make import demo, extend, pack, sft, train
from ultralong.cli.measure import answer, compare, evaluate, loss, make_samples, score
from ultralong.cli.runs import report, run

# These read their own options.
BENCHES: dict[str, Callable[[Sequence[str]], None]] = {
    "bench attention": bench_attention,
    "bench prefill": bench_prefill,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "extend": extend,
    "pack": pack,
    "data build": data.build,
    "data stats": data.stats,
    "data show": data.show,
    "data decontaminate": texts.decontaminate,
    "data refine": texts.refine,
    "data render": texts.render,
    "data merge": texts.merge,
    "train": train,
    "sft": sft,
    "eval": evaluate,
    "eval loss": loss,
    "eval run": run,
    "eval report": report,
    "eval answer": answer,
    "eval make": make_samples,
    "eval score": score,
    "eval compare": compare,
    **BENCHES,
    "bench train": bench_train,
    "bench compare": bench_compare,
    "plan": plan,
    "launch": launch,
    "course start": course.start,
    "course check": course.check,
    "course site": course.site,
    "demo": demo,
}


# `ultralong eval TESTS MODEL` is `eval run`, but for these two, which keep their own options.
SHORT = ("needle", "perplexity")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (the command failed) or 2 (the line was not understood)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] == "--version":
        print(__version__)
        sys.exit(0)
    if words[0] == "eval" and len(words) > 2 and words[1] not in SHORT and not words[1].startswith("-"):
        words = words if " ".join(words[:2]) in COMMANDS else ["eval", "run", *words[1:]]
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        print(f"ultralong: unknown command {words[0]!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    if name in BENCHES:
        BENCHES[name](words[2:])
        return
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

    # transformers warns of a factor above the ratio of the windows, which the recipe means, and draws a bar a file.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
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
