"""Small file helpers used by every room: atomic writes, hashes, JSON lines.

A file written here is whole or is not there: it is written beside its final place and moved over it in one step, so a
crash, a full disk or a second reader never sees half of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ultralong.utils.text_formats import json_value

PARTIAL = r"\.[0-9a-f]{12}\.partial"  # how the name of a file that is being written ends
LOCK = ".lock"  # the file by which a folder is held for writing
TAIL = 1 << 16  # bytes read at a time from the end of a log
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS has in a file's place


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, on one file system, that becomes `path` where the block ends well.

    Args:
        path: The file to write. Its folder is created when missing.
    """
    target = Path(path)
    make_folder(target.parent)
    with _partial_file(target) as temporary, _full_disk_at(target):
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # a writer may have put another file there
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)


@contextmanager
def _partial_file(target: Path) -> Iterator[Path]:
    """Make an empty `.NAME.HEX.partial` and hold it; it is removed at the end, where it is still there.

    The system drops the lock with the process: so what a killed one left can be told from what another process, which
    need not hold the folder, is writing (`export gguf` into a run's folder, say). A writer that puts another file in
    its place, as `os.replace` does, gives the lock up.
    """
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
        # Not a file of `tempfile`, which is private: what a run leaves follows the user's umask like any other file.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _claimed(descriptor)  # a file system without locks has none to tell by, and nothing is removed there
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # taken for a killed writer's before it was locked
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_partials(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder; what is being written stays, and what can't be opened for writing.

    Args:
        folder: The folder.
        name: The file whose partial files are meant; None means all.
    """
    stray = re.compile(rf"\.{'.+' if name is None else re.escape(name)}{PARTIAL}")
    for entry in folder.iterdir():
        if stray.fullmatch(entry.name):
            with suppress(OSError):  # a link, a folder, a file of someone else, or one that is gone by now
                descriptor = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _claimed(descriptor):
                        entry.unlink()
                finally:
                    os.close(descriptor)


def _claimed(descriptor: int) -> bool:
    """Lock a file for this process and those it forks meanwhile, where nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _full_disk_at(path: Path) -> Iterator[None]:
    """Give the error of a full disk its place, which a failed write does not know."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it, where they are missing.

    Raises:
        ValueError: Something on the way is a file; the message names it.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), folder)
        raise ValueError(f"{file} is a file, and a folder is needed there. Choose another path.") from None
    return folder


def drop_partials(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `path` left of it; nothing where its folder is missing."""
    if (folder := Path(path).parent).is_dir():
        _remove_partials(folder, Path(path).name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused, as JSON has no such numbers.

    Raises:
        ValueError: `value` holds a NaN or an infinity.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def locked(folder: str | os.PathLike[str], wait: float = 0.0, by: str = "--out") -> Iterator[None]:
    """Hold a folder for writing as the only process that does; the system releases it even when the process is killed.

    What a killed process had half written there (`atomic_path`) is removed; what others are writing stays.

    Args:
        folder: Made when missing. The lock is its file `.lock`, which stays.
        wait: See `file_lock`.
        by: What the user names the folder by, for the error.

    Raises:
        ValueError: Another process writes there.
    """
    folder = make_folder(folder)
    busy = f"Another process is writing to {folder}: wait for it, end it, or give another {by}."
    with file_lock(folder / LOCK, busy, wait=wait), _full_disk_at(folder):
        _remove_partials(folder)
        yield


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether a process holds a folder by `locked` now. Nothing is made or written."""
    path = Path(folder) / LOCK
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder of someone else, to be read only
        return False


@contextmanager
def file_lock(path: str | os.PathLike[str], busy: str, *, remove: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file as the only process that does.

    Args:
        path: The lock file, made when missing. A link is refused: what it points to is not ours.
        busy: The error's message when another process holds it.
        remove: True removes the file at the end, while it is still held.
        wait: Seconds to wait for another process that holds it.

    Raises:
        ValueError: Another process holds it, or it is a link.
    """
    if os.path.islink(path):
        raise ValueError(f"{path} is a link, and locks are files of their own. Remove it.")
    lock = FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(busy) from None
    try:
        yield
    finally:
        if remove:
            Path(path).unlink(missing_ok=True)
        lock.release()


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: It is not JSON, or of another type.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}. Restore it.")
    return found


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is not JSON; the message names it and the place.
    """
    try:
        return json_value(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Restore it or delete it and run again.") from error


def append_jsonl(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Append one record as a line of JSON.

    A line counts once its newline is written. What a crash left of an unfinished line is cut off first, so that a
    resumed run's records do not grow onto it.

    Raises:
        ValueError: `record` holds a NaN or an infinity, or the log is a link: what it points to is not ours.
    """
    if os.path.islink(path):
        raise ValueError(f"{path} is a link, and logs are files of their own. Remove it.")
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _full_disk_at(Path(path)), open(path, "ab+") as stream:
        _cut_unfinished_line(stream)
        stream.write(line.encode("utf-8"))


def _cut_unfinished_line(stream: BinaryIO) -> None:
    end = start = stream.seek(0, os.SEEK_END)
    while start > 0:
        start = max(0, start - TAIL)
        stream.seek(start)
        found = stream.read(min(TAIL, end - start)).rfind(b"\n")
        if found >= 0:
            if start + found + 1 < end:
                stream.truncate(start + found + 1)
            return
    stream.truncate(0)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a JSON-lines log written by `append_jsonl`; a last line that a crash cut off is left out.

    Raises:
        ValueError: A finished line is no JSON object; the message names the file and the line.
    """
    # Split at bytes: str.splitlines also splits at separators that JSON strings may hold, such as U+2028.
    *lines, _unfinished = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json_value(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(records[-1], dict):
            raise ValueError(f"{path}, line {number}: an object is needed, found {type(records[-1]).__name__}.")
    return records


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as lower-case hex, read piece by piece."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
