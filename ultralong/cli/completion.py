"""Completion of commands and options in a shell."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Annotated, Any, Literal, Union

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, arg, subcommand


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
    print(script(shell))


def script(shell: str) -> str:
    """The script of `completion`, as tyro writes it for all commands together."""
    import contextlib
    import io

    import tyro

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(_everything(), prog="ultralong", args=["--tyro-print-completion", shell])
    return out.getvalue()


def _everything() -> Any:
    """All commands as one parser with commands inside groups; only its shape is used."""
    from ultralong.cli.options import parser_of
    from ultralong.cli.table import COMMANDS, GROUPS, explanation

    parsers = {
        name: Annotated[
            parser_of(command), subcommand(name.split()[-1], description=explanation(command).split("\n\n")[0])
        ]
        for name, command in COMMANDS.items()
    }
    outer = [parser for name, parser in parsers.items() if " " not in name]
    for group, text in GROUPS.items():
        inner = Union[tuple(parser for name, parser in parsers.items() if name.startswith(f"{group} "))]  # noqa: UP007
        made = make_dataclass(group, [("command", Annotated[inner, arg(name="")], field())])
        outer.append(Annotated[made, subcommand(group, description=text)])
    return Annotated[Union[tuple(outer)], OmitSubcommandPrefixes, OmitArgPrefixes]  # noqa: UP007
