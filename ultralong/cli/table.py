"""Which commands there are, in the order in which a model goes through them, and what is said of them."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Literal

import tyro

from ultralong import __version__
from ultralong.cli import bench, bench_data, cluster, course, data, make, measure, runs, serve, texts
from ultralong.cli.completion import script
from ultralong.cli.options import parser_of


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands, options and their choices in a shell.

    A shell started afterwards knows the commands; zsh needs ~/.zfunc in its fpath before compinit.

    Examples:
      ultralong completion bash > ~/.local/share/bash-completion/completions/ultralong
      ultralong completion zsh > ~/.zfunc/_ultralong
      ultralong completion fish > ~/.config/fish/completions/ultralong.fish

    Args:
        shell: The shell that the script is for.
    """
    print(script(shell, COMMANDS, GROUPS))


SECTIONS: dict[str, dict[str, Callable[..., None]]] = {
    "See it work": {"demo": make.demo},
    "1. Extend a model's window": {"extend": make.extend},
    "2. Make rows of text": {
        "pack": make.pack,
        "data build": data.build,
        "data stats": data.stats,
        "data show": data.show,
        "data verify": serve.verify,
        "data decontaminate": texts.decontaminate,
        "data refine": texts.refine,
        "data render": texts.render,
        "data merge": texts.merge,
    },
    "3. Train": {
        "plan": cluster.plan,
        "train": make.train,
        "sft": make.sft,
        "launch": cluster.launch,
        "launch rehearse": cluster.rehearse,
        "runs": cluster.runs,
        "runs verify": serve.verify,
        "merge": serve.merge,
    },
    "4. Measure the model": {
        "eval needle": measure.needle,
        "eval perplexity": measure.perplexity,
        "eval longppl": runs.longppl,
        "eval loss": measure.loss,
        "eval run": runs.run,
        "eval report": runs.report,
        "eval answer": measure.answer,
        "eval make": measure.make_samples,
        "eval score": measure.score,
        "eval compare": measure.compare,
    },
    "5. Use the model": {
        "check": serve.check,
        "verify": serve.verify,
        "serve": serve.serve,
        "export gguf": make.export_gguf,
    },
    "Compare ways to do it": {"search": runs.search, "ablate": runs.ablate},
    "Measure the machine": {
        "bench attention": bench.attention,
        "bench prefill": bench.prefill,
        "bench saves": bench_data.saves,
        "bench decode": bench.decode,
        "bench serve": bench.serve,
        "bench train": bench.train,
        "bench host": bench.host,
        "bench readers": bench_data.readers,
        "bench configs": bench_data.configs,
        "bench longest": bench_data.longest,
        "bench compare": bench.compare,
        "bench rates": bench.rates,
        "bench data": bench_data.data,
        "bench samples": bench_data.samples,
        "bench sft-prepare": bench_data.sft_prepare,
        "bench sft": bench_data.sft,
        "bench sft-convert": bench_data.sft_convert,
        "bench error-curve": bench.error_curve,
        "bench tables": bench_data.tables,
    },
    "Learn how it works": {
        "course start": course.start,
        "course check": course.check,
        "course site": course.site,
    },
    "This program": {"completion": completion},
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}
GROUPS = {
    "data": "Rows of text: recipes built, counted, looked at and cleaned.",
    "eval": "A model measured: needles, perplexity, tasks, reports.",
    "export": "The model in other formats.",
    "course": "The course: a folder to work in, how far you are, its pages.",
    "bench": "This machine measured: attention, prefill, decoding, training, data.",
}
MARK = "(explanation)"
WIDEST = 100  # columns that text is wrapped to on a wider terminal


def overview() -> str:
    """What `ultralong --help` prints: the commands with their first lines, in the order of their use."""
    lines = [
        f"ultralong {__version__}: extend a language model's window to millions of tokens.",
        "",
        "usage: ultralong COMMAND ...    (ultralong COMMAND --help explains a command and gives an example)",
    ]
    width = max(map(len, COMMANDS)) + 2
    for title, commands in SECTIONS.items():
        lines += ["", title]
        lines += [_row(name, command, width) for name, command in commands.items()]
    return "\n".join(
        [
            *lines,
            "",
            "Every command takes --help and --traceback (where an error happened). Lengths in tokens take 128k and 1m.",
            "Start with: ultralong demo",
        ]
    )


def group_text(group: str) -> str:
    """What `ultralong eval --help` prints, or another group's."""
    commands = {name: command for name, command in COMMANDS.items() if name.startswith(f"{group} ")}
    width = max(map(len, commands)) + 2
    rows = [_row(name, command, width) for name, command in commands.items()]
    return "\n".join([f"usage: ultralong {group} COMMAND ...    (--help explains one)", "", GROUPS[group], "", *rows])


def suggestion(words: Sequence[str]) -> str:
    """What is said of a command that does not exist, with the one that may have been meant."""
    if words[0] in GROUPS:
        wrong, there = f"unknown command {' '.join(words[:2])!r}", [n for n in COMMANDS if n.startswith(words[0] + " ")]
        last = [name.split()[1] for name in there]
        near = [f"{words[0]} {name}" for name in difflib.get_close_matches(words[1], last, n=1)]
    else:
        wrong, there = f"unknown command {words[0]!r}", [*COMMANDS, *GROUPS]
        near = difflib.get_close_matches(" ".join(words[:2]), there, n=1, cutoff=0.8)
        near = near or difflib.get_close_matches(words[0], there, n=1)
        # The last word of a command's name alone: `ultralong needle`.
        near = near or [name for name in COMMANDS if name.split()[-1] == words[0]][:1]
    if near:
        return f"{wrong}. Did you mean: ultralong {near[0]}?"
    return f"{wrong}. Commands: {', '.join(there)}."


def help_text(name: str, command: Callable[..., None]) -> str:
    """What `ultralong NAME --help` prints: usage, explanation, options."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(parser_of(command), prog=f"ultralong {name}", args=["--help"], description=MARK)
    # tyro would join the lines of a paragraph and not wrap them again.
    lines = [line.rstrip() for line in out.getvalue().replace(MARK, explanation(command)).splitlines()]
    return "\n".join(lines).rstrip()


def explanation(command: Callable[..., None]) -> str:
    """The docstring without its list of arguments, which stands beside the options, wrapped to the terminal."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0].strip().replace("`", "")
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return "\n\n".join(_wrapped(paragraph, width) for paragraph in text.split("\n\n"))


def _wrapped(paragraph: str, width: int) -> str:
    """A paragraph as lines of at most `width`; examples keep theirs, to be pasted."""
    if paragraph.startswith("Example"):
        return paragraph
    return textwrap.fill(paragraph, width, break_on_hyphens=False, break_long_words=False)


def _row(name: str, command: Callable[..., None], width: int) -> str:
    return f"  {name:{width}}{inspect.cleandoc(command.__doc__ or '').splitlines()[0]}"
