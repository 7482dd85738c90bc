"""How a command ends: one line for what its user can mend, a traceback with its place for everything else.

Under torchrun every rank comes here. Ranks of a host that fail at the same place say a one-line error once; a
traceback names rank and host. Exit codes: 1 for a failure, 2 for a command line that was not understood, 130 for
Ctrl-C.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from ultralong.cli.shared import interrupted, shown
from ultralong.utils.processes import ChildFailed, Killed

# What a user changes about files and disks. An OSError without a number is prose, as transformers raises it.
MENDABLE = {
    None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC,
    errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY,
}  # fmt: skip


# Of a factor that is not the ratio of two windows, and of a longrope without one: both are as they should be.
OF_EVERY_SCALING = ("The explicitly set RoPE scaling factor", "This model config has set a `rope_parameters")


def mendable(error: BaseException) -> bool:
    """Whether a user can act on the error's message alone: wrong values, missing packages, files that are not there."""
    if isinstance(error, ImportError):
        return error.name is None  # a sentence of ours or of a library, not a module that Python did not find
    if isinstance(error, OSError):
        return error.errno in MENDABLE and not isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, ValueError | FloatingPointError | MemoryError | Killed)


def guarded(name: str, work: Callable[[], None], whole: bool = False, own: bool = False) -> None:
    """Do the work of a command; where it fails, say so and exit.

    Args:
        name: The command's name.
        work: What it does.
        whole: Show the traceback of every error.
        own: The process is the command's own, and so are its signals.

    Raises:
        SystemExit: With 1 after a failure, the code of a run in other processes, or 130 after Ctrl-C.
    """
    came: list[int] = []
    try:
        with _plain_warnings(name), _interruptible(came) if own else nullcontext():
            work()
    except KeyboardInterrupt:
        _stopped(name)
    except BrokenPipeError:
        # Whoever read the output has what it wanted (`| head`); writing more at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ChildFailed as failed:
        if whole:
            traceback.print_exc()
        sys.exit(failed.code)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - told in full, and the exit code says it; torch's CheckpointException
        if came or interrupted(error):
            if whole:  # it may be an error of its own, as of what a command does when it is stopped
                traceback.print_exc()
            _stopped(name)
        if whole or not mendable(error):
            sys.stderr.write(f"ultralong {name}: failed{_place()}\n{traceback.format_exc()}")
        elif _first_to_say(error):
            sys.stderr.write(f"ultralong {name}: error: {shown(' '.join(_sentence(error).split()))}\n")
        sys.stderr.flush()
        sys.exit(1)


def _stopped(name: str) -> NoReturn:
    print(f"ultralong {name}: stopped.", file=sys.stderr)
    # Python ends itself by a signal, not by this code, where a Ctrl-C went through an exec, as of a dataclass that is
    # made; the next one forgets it.
    exec("")
    sys.exit(130)


@contextmanager
def _interruptible(came: list[int]) -> Iterator[None]:
    """Let a Ctrl-C raise inside, and note it: an import may lose the exception, and fail by what it then lacks."""

    def interrupt(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if callable(before):  # it is not ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _plain_warnings(name: str) -> Iterator[None]:
    """Warnings of this package as one line each, without the place and the line of source that Python adds.

    What transformers says of a scaling whenever it opens a config is left out: `ultralong check` says what it reads.
    """
    package, usual = str(Path(__file__).parents[1]), warnings.formatwarning

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is not UserWarning or not filename.startswith(package):
            return usual(message, category, filename, lineno, line)
        return f"ultralong {name}: warning: {shown(' '.join(str(message).split()))}\n"

    warnings.formatwarning = plain
    rope = logging.getLogger("transformers.modeling_rope_utils")
    rope.addFilter(_tells_more)
    try:
        yield
    finally:
        warnings.formatwarning = usual
        rope.removeFilter(_tells_more)


def _tells_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OF_EVERY_SCALING)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names) or 'a file'}: {error.strerror}."
    if isinstance(error, MemoryError):
        return f"there is not enough memory for it ({error or 'no more was given'}). Ask for less."
    return str(error) or type(error).__name__


def _place() -> str:
    """Which rank this is, and where, under torchrun."""
    if "RANK" not in os.environ:
        return ":"
    return f" on rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}, host {socket.gethostname()}:"


def _first_to_say(error: BaseException) -> bool:
    """Whether no other rank of this host has said an error of this place yet.

    torchrun gives each rank a file for its error, in a folder that the ranks of a host and an attempt share.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{type(error).__name__} {frames[-1].filename} {frames[-1].lineno}" if frames else type(error).__name__
    mark = Path(own).parents[1] / f"said-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
