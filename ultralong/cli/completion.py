"""Completion of commands and options in a shell."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Union

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, arg, subcommand

from ultralong.cli.options import options_of, parser_of


def script(shell: str, commands: Mapping[str, Callable[..., None]], groups: Mapping[str, str]) -> str:
    """The script that completes a command line, as tyro writes it for all commands together.

    Args:
        shell: bash, zsh or fish.
        commands: The commands by name; one in a group is named with the group first.
        groups: What is said of each group.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(_everything(commands, groups), prog="ultralong", args=["--tyro-print-completion", shell])
    return out.getvalue()


def _everything(commands: Mapping[str, Callable[..., None]], groups: Mapping[str, str]) -> Any:
    """All commands as one parser with commands inside groups; only its shape is used."""
    parsers = {
        name: Annotated[parser_of(command), subcommand(name.split()[-1], description=_first_line(command))]
        for name, command in commands.items()
    }
    inside = {name.partition(" ")[0] for name in commands if " " in name}
    outer = [parser for name, parser in parsers.items() if " " not in name and name not in inside]
    # `launch` is a command and has one inside, whose name stands where its own first word would.
    for name in inside & set(commands):
        choices: Any = Union[(*(parser for other, parser in parsers.items() if other.startswith(f"{name} ")), None)]
        options = [option.field() for option in options_of(commands[name]) if not option.positional]
        word = ("command", Annotated[choices, arg(name="")], field(default=None))
        both = make_dataclass(name, [*options, word], kw_only=True)
        outer.append(Annotated[both, subcommand(name, description=_first_line(commands[name]))])
    for group, text in groups.items():
        inner: Any = Union[tuple(parser for name, parser in parsers.items() if name.startswith(f"{group} "))]  # noqa: UP007
        made = make_dataclass(group, [("command", Annotated[inner, arg(name="")], field())])
        outer.append(Annotated[made, subcommand(group, description=text)])
    return Annotated[Union[tuple(outer)], OmitSubcommandPrefixes, OmitArgPrefixes]  # noqa: UP007


def _first_line(command: Callable[..., None]) -> str:
    return (command.__doc__ or "").splitlines()[0]
