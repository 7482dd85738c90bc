"""The command line: one function a command, each a thin layer over the library."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import tyro

from ultralong import __version__
from ultralong.cli.errors import guarded
from ultralong.cli.options import call, parser_of
from ultralong.cli.shared import plain_streams
from ultralong.cli.table import COMMANDS, GROUPS, explanation, group_text, help_text, overview, suggestion
from ultralong.utils.processes import end_with_parent, keep_imports
from ultralong.utils.words import expand_word, odd_word

__all__ = ["COMMANDS", "GROUPS", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (the command failed) or 2 (the line was not understood).

    `ultralong` alone, like `cargo`, shows what there is and exits with 0; a group alone (`ultralong eval`) lists its
    commands and exits with 2, as one of them is missing.
    """
    for name in ("stdout", "stderr"):  # one that was closed by who started this (>&-) is None
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process
    if arguments is None:
        keep_imports()
    try:
        with plain_streams():
            _run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # what reads the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        if arguments is None:  # this process ends now: its memory goes as a whole, a last collection takes a second
            gc.freeze()


def _run(arguments: Sequence[str] | None) -> None:
    words = [expand_word(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if (complaint := odd_word(words)) is not None:
        print(f"ultralong: {complaint}", file=sys.stderr)
        sys.exit(2)
    if arguments is None and "RANK" in os.environ:
        end_with_parent()  # a rank of torchrun: nothing may go on in a run's folder when its agent was killed
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] in ("-V", "--version"):
        print(f"ultralong {__version__}")
        sys.exit(0)
    if words[0] in GROUPS and (len(words) == 1 or words[1] in ("-h", "--help")):
        asked = len(words) > 1
        print(group_text(words[0]), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        print(f"ultralong: {suggestion(words)}", file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[name]
    rest = words[len(name.split()) :]
    if {"-h", "--help"} & set(rest):
        print(help_text(name, command))
        sys.exit(0)
    options = tyro.cli(parser_of(command), prog=f"ultralong {name}", args=rest, description=explanation(command))
    with _no_bars() if getattr(options, "quiet", False) else nullcontext():
        guarded(name, lambda: call(command, options), whole=options.traceback, own=arguments is None)


def _no_bars() -> AbstractContextManager[None]:
    from ultralong.utils.progress import hidden_bars

    return hidden_bars()
