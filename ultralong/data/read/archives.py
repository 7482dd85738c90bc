"""Chosen members of an archive, written where they cannot do harm.

Archives come from a network. Only regular files are written, only below the target folder, and nothing in them is ever
imported or run: links, devices, absolute paths and paths with `..` are refused outright, because an archive that holds
one of these where a text is expected is not the archive that was asked for.
"""

from __future__ import annotations

import fnmatch
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
ZIP_ENDINGS = (".zip", ".whl")
# Texts compress to a tenth, logs to a hundredth; what grows beyond both of these was made to fill a disk.
LARGEST_GROWTH = 200
ALWAYS_ALLOWED = 1 << 30  # bytes
MOST_FILES = 5_000_000
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)


def matches(name: str, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> bool:
    """Whether a path matches one of `include` and none of `exclude` (shell patterns; `*` crosses folders)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in include) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in exclude
    )


def extract(
    archive: Path,
    folder: Path,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    inside: str | None = None,
) -> int:
    """Write the chosen members of an archive below `folder`.

    Args:
        archive: A .tar (.gz, .xz, .bz2), .zip, .whl or .deb file.
        folder: Where they go, under their paths in the archive.
        include: Shell patterns of the paths wanted.
        exclude: Shell patterns of paths not wanted after all.
        inside: Path of an archive within the archive; the patterns then speak of that one.

    Returns:
        How many files were written.

    Raises:
        ValueError: The archive is damaged, protected by a password, of a kind not known or far too large unpacked, a
            wanted member is unsafe or no file, or nothing matches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if inside is not None:
        # Beside the folder, not in it: the inner archive may hold a file of any name, its own as well.
        with tempfile.TemporaryDirectory(prefix=".outer-", dir=folder.parent) as outer:
            if extract(archive, Path(outer), (inside,)) != 1:
                raise ValueError(f"{archive.name} holds several members {inside!r}; one archive is needed.")
            (found,) = (path for path in Path(outer).rglob("*") if path.is_file())
            return extract(found, folder, include, exclude)
    written = 0
    room = max(ALWAYS_ALLOWED, LARGEST_GROWTH * archive.stat().st_size)
    try:
        for name, stream in _members(archive):
            if not matches(name, include, exclude):
                continue
            target = folder / _safe(name, archive)
            room -= _write(stream, target, room, archive)
            written += 1
            if written > MOST_FILES:
                raise ValueError(f"{archive.name} holds more than {MOST_FILES:,} files. It was not unpacked.")
    except (RuntimeError, NotImplementedError) as error:  # zipfile: a password, or a method that it does not know
        raise ValueError(f"{archive} cannot be unpacked: {error}. Unpack it by hand and give the folder.") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{archive} is damaged ({error}). Delete it and fetch it again.") from error
    if not written:
        raise ValueError(f"nothing in {archive.name} matches {', '.join(include)}. Correct the recipe's `include`.")
    return written


def _write(stream: IO[bytes], target: Path, room: int, archive: Path) -> int:
    """Write a member into a file; how many bytes it had."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = open(target, "wb")  # noqa: SIM115 - used below
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{archive.name} holds a file and a folder of one name, {target.name}.") from error
    size = 0
    with out:
        while piece := stream.read(1 << 20):
            size += len(piece)
            if size > room:
                raise ValueError(
                    f"{archive.name} holds more than {LARGEST_GROWTH} times its own size. It was not unpacked; unpack "
                    "it by hand where that is meant."
                )
            out.write(piece)
    return size


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ValueError(f"{archive.name} holds the unsafe path {name!r}. It was not unpacked.")
    return path


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Every regular file as (path without a leading ./, stream), in the archive's order."""
    name = archive.name.lower()
    if name.endswith(ZIP_ENDINGS):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.is_dir():
                    with opened.open(entry) as member:
                        yield entry.filename, member
    elif name.endswith((*TAR_ENDINGS, ".deb")):
        # Read as a stream: seeking back in a compressed archive would unpack it again for every member.
        with (
            _tar_stream(archive) as raw,
            tarfile.open(fileobj=raw, mode="r|" if name.endswith(".deb") else "r|*") as tar,
        ):
            for item in tar:
                if item.isfile():
                    stream = tar.extractfile(item)
                    assert stream is not None
                    yield item.name.removeprefix("./"), stream
    else:
        raise ValueError(
            f"{archive.name} is no archive known here ({', '.join((*TAR_ENDINGS, *ZIP_ENDINGS, '.deb'))})."
        )


@contextmanager
def _tar_stream(archive: Path) -> Iterator[IO[bytes]]:
    """The tar inside a file; dpkg-deb unpacks the compression of a .deb."""
    if not archive.name.lower().endswith(".deb"):
        with open(archive, "rb") as stream:
            yield stream
        return
    if shutil.which("dpkg-deb") is None:
        raise ValueError(
            "dpkg-deb is needed to open .deb files, and is not on this machine. Use a Debian or Ubuntu system."
        )
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            process.stdout.read()  # a tar may end before its pipe does, and dpkg-deb fails when nobody reads on
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            raise ValueError(
                f"{archive} is damaged (dpkg-deb gave {process.returncode}). Delete it and fetch it again."
            )
