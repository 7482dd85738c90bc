"""The files of a folder, links followed, under names that can be written down."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ultralong.data.read.archives import matches
from ultralong.data.read.documents import ReadReport
from ultralong.data.read.messages import is_unicode


def list_files(
    root: Path,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    report: ReadReport | None = None,
) -> list[tuple[str, Path]]:
    """(path below `root`, path) of every file below a folder, sorted, hidden ones left out; or of `root` if a file.

    Links to files and folders are followed, as in the cache of a hub's client, where every file is one. What a link
    leads to is taken once: not again where the folder holds it anyway, or another link leads there too.

    Args:
        root: A folder or a file; `~` is the home folder.
        include: Shell patterns of the files wanted.
        exclude: Shell patterns of files not wanted after all.
        report: Where links are counted.

    Raises:
        ValueError: There is nothing there, or nothing that matches.
    """
    root, report = root.expanduser(), report if report is not None else ReadReport()
    if root.is_file():
        return [(readable(root.name), root)]
    if not root.exists():
        raise ValueError(f"{root} does not exist. Correct the path.")
    found: list[tuple[str, Path]] = []
    linked: list[tuple[str, Path]] = []
    for name, path, through_link in _walk(root, report):
        if matches(name, include, exclude):
            (linked if through_link else found).append((name, path))
    taken = {os.path.realpath(path) for _, path in found} if linked else set()
    for name, path in sorted(linked):
        target = os.path.realpath(path)
        if target in taken:
            report.note("a link to a file that is read anyway", name)
            continue
        taken.add(target)
        found.append((name, path))
        report.note("a file behind a link", name)
    if not found:
        why = "".join(f"; {count:,} {reason}" for reason, count in report.noted.items() if "link" in reason)
        raise ValueError(f"{root} holds no file that matches {', '.join(include)}{why}.")
    # By directory first, so that the files of one directory come one after the other.
    return sorted(found, key=lambda item: item[0].rpartition("/")[::2])


def readable(name: str) -> str:
    """A name that is valid Unicode: bytes of a file's name, or halves of a pair, that are not, are spelled out."""
    return name if is_unicode(name) else name.encode("utf-8", "backslashreplace").decode()


def _walk(root: Path, report: ReadReport) -> Iterator[tuple[str, Path, bool]]:
    """(name, path, whether a link leads there) of every file; a folder that was walked is not walked again."""
    seen: set[str] = set()
    plain, linked = [root], list[Path]()
    while plain or linked:
        # Linked folders last, so that what the folder holds itself is never taken for something behind a link.
        through_link = not plain
        folder = linked.pop() if through_link else plain.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(_entries(folder, root, report), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            name = readable(path.relative_to(root).as_posix())
            behind = through_link or entry.is_symlink()
            kind = _kind(entry)
            if kind == "folder":
                (linked if behind else plain).append(path)
            elif kind == "file":
                yield name, path, behind
            else:
                report.note("a link to nothing" if entry.is_symlink() else "neither a file nor a folder", name)


def _kind(entry: os.DirEntry[str]) -> str | None:
    """What an entry is, links followed; None where a link leads round in a circle, too."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def _entries(folder: Path, root: Path, report: ReadReport) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if folder == root:
            raise ValueError(f"{root} cannot be listed ({error.strerror}). Correct the path or its rights.") from error
        report.skip("folder that cannot be listed", f"{folder.relative_to(root)} ({error.strerror})")
        return []


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of files as `list_files` gives them, by their names, sizes and times: their content is not read."""
    digest = hashlib.sha256()
    for name, path in files:
        stat = path.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
