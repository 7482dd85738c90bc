"""What the commands share: where numbers go, who speaks when several processes run one command, what is printed.

Names of files, recipes and models, texts of documents and words of a server are other people's. A terminal takes
escape sequences in them as orders: to rename the window, to write over a line, to copy into the clipboard. Keys and
passwords that they, or an error of a library, hold are covered.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

from tyro.conf import arg

from ultralong.utils.files import write_json
from ultralong.utils.processes import ChildFailed, Killed
from ultralong.utils.words import covered, secrets_of

Json = Annotated[Path | None, arg(metavar="FILE")]
File = Annotated[Path, arg(metavar="FILE")]
# Control characters, those that turn a text's direction, and halves of surrogate pairs, which no stream can encode.
HIDDEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
COLOUR = r"\x1b\[[0-9;]*m"
MOVES = r"\x1b\[[0-9]*A|\r"  # of progress bars, which are on the error stream
ON_OUTPUT = re.compile(f"({COLOUR}|\r\n)|{HIDDEN}")
ON_ERRORS = re.compile(f"({COLOUR}|{MOVES})|{HIDDEN}")
IN_A_SENTENCE = re.compile(f"(){HIDDEN}")


def is_main() -> bool:
    """True on the process that prints and writes: the first under torchrun, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def quoted(path: Path | str) -> str:
    """A path as a shell takes it, for commands that are printed to be copied."""
    return shlex.quote(str(path))


def leave(path: Path | None, value: Any) -> None:
    """Write the numbers of a command where they were asked for."""
    if path is not None and is_main():
        write_json(path, value)


@contextmanager
def resumable(out: Path | str) -> Iterator[None]:
    """Say how to resume what was stopped or killed meanwhile, for commands that do so when they are typed again.

    Args:
        out: Folder in which the same command finds what is done.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit | ChildFailed | Killed) or interrupted(error)
        if stopped and is_main():
            print(f"note: the same command again resumes it in {out} where it stopped.", file=sys.stderr)
        raise


def interrupted(error: BaseException) -> bool:
    """Whether this is a Ctrl-C, or what a library made of one: transformers while it imports, torch while it saves.

    torch's CheckpointException holds what each rank failed by in `failures`, not as its cause, and is no Exception.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.add(id(found))
        failures = getattr(found, "failures", {}).values()
        left += [found.__cause__, found.__context__, *(pair[0] for pair in failures if isinstance(pair, tuple))]
    return False


def shown(text: str, pattern: re.Pattern[str] = IN_A_SENTENCE) -> str:
    """The text with each control character as a backslash would write it, but for what the pattern's group keeps."""

    def spelled(found: re.Match[str]) -> str:
        return found[1] or found[0].encode("unicode_escape", "surrogatepass").decode("ascii")

    return pattern.sub(spelled, text)


class _Stream:
    """A text stream that shows control characters instead of sending them, and covers secrets."""

    def __init__(self, stream: TextIO, kept: re.Pattern[str]) -> None:
        self._stream, self._kept, self._secrets = stream, kept, secrets_of()

    def write(self, text: str) -> int:
        self._stream.write(shown(covered(text, self._secrets), self._kept))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Let what is printed meanwhile hold colours and progress bars, and no other order to a terminal.

    Letters that the terminal's encoding lacks are spelled too, where printing them would be an error.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(AttributeError):  # one that a test has put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = _Stream(before[0], ON_OUTPUT), _Stream(before[1], ON_ERRORS)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
