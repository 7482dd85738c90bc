"""A full disk behind the errors that libraries make of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultralong.utils.files import FULL

PROBE = 1 << 20  # bytes that a disk takes which is not full


@contextmanager
def full_disk_named(folder: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Raise what a library makes of a full disk as the OSError that it is.

    Libraries that write by themselves report it as errors of their own kinds, some without the reason.

    Args:
        folder: Where the block writes.
        advice: What to do about it, as the end of a sentence.

    Raises:
        OSError: The disk or a quota is full, or a file may not be larger.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        full = next(filter(None, map(_full_disk, _chain(error))), None) or _try_to_write(Path(folder))
        if full is None:
            raise
        raise OSError(full.errno, f"{full.strerror}; {advice}", str(folder)) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, those it was raised for, and those of torch's other ranks."""
    todo, seen = [error], set[int]()
    while todo:
        if id(found := todo.pop(0)) not in seen:
            seen.add(id(found))
            yield found
            others = [failure[0] for failure in getattr(found, "failures", {}).values()]
            todo += [other for other in (found.__cause__, found.__context__, *others) if other is not None]


def _full_disk(error: BaseException) -> OSError | None:
    return error if isinstance(error, OSError) and error.errno in FULL else None


def _try_to_write(folder: Path) -> OSError | None:
    """What the system says of a file that is written there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    probe = place / f".{secrets.token_hex(6)}.partial"
    try:
        probe.write_bytes(b"\0" * PROBE)
        return None
    except OSError as error:
        return _full_disk(error)
    finally:
        probe.unlink(missing_ok=True)
