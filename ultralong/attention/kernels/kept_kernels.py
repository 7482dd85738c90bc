"""Where flash-attn 4 keeps the kernels that it compiles, so that the next process need not compile them again.

The package (4.0.0b36, `flash_attn/cute/cache_utils.py`) can keep them on disk. By default it does not, and its own
folder for it, `/tmp/USER/..`, is one that anybody could have made before. What is kept is loaded as code, so here it is
a folder that no other user can write, on a disk of this host: its file locks are not for network file systems.

Processes of one host that start together each compile what is not there yet; one writes an entry, under a lock, to
another name and renames it, and the others find it there. A broken entry is compiled again. Who waits 15 s for a lock,
as when another process was stopped while it wrote, gets an error.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

log = logging.getLogger(__name__)

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
# File systems of one host. Others (NFS, Lustre, FUSE, what is not known) may be many hosts', and lock badly.
LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
ROOM = 256 * 2**20  # bytes that must be free: a full disk fails in the package's locks, in the middle of a run
MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def kept_kernels() -> Iterator[None]:
    """Import flash-attn 4 inside of this: it then keeps compiled kernels, where a folder for them is found.

    The package takes it from two environment variables as it is imported; they are set for that long only. Where either
    is set already, or there is no GPU, nothing is touched: `FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=0` turns it off.
    """
    as_it_is = ENABLED in os.environ or FOLDER in os.environ or not torch.cuda.is_available()
    words, said = ({}, None) if as_it_is else _words()
    os.environ.update(words)
    try:
        yield
    finally:
        for name in words:
            os.environ.pop(name, None)
    if said is not None:  # not where the package is not installed
        log.log(logging.INFO if words else logging.WARNING, said)


def _words() -> tuple[Mapping[str, str], str]:
    """The variables, none where there is no folder, and what is to be said."""
    reasons = []
    # Not every kernel's key names the GPU that it was compiled for, so each kind has a folder of its own.
    kind = "flash-attn-4-sm{}{}".format(*torch.cuda.get_device_capability())
    for base in (cache_base, temporary_base):
        try:
            folder = own_folder(*base(), kind)
        except OSError as error:
            reasons.append(str(error))
        else:
            return {ENABLED: "1", FOLDER: str(folder)}, f"flash-attn 4 keeps the kernels that it compiles in {folder}"
    return {}, f"flash-attn 4 compiles its kernels anew in each process: {'; '.join(reasons)}"


def cache_base() -> tuple[Path, str]:
    """This user's cache, and the name of a folder in it.

    Raises:
        FileNotFoundError: The user has no home, as one without a name in a container.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():  # "~" stays where there is no home, and would be made in the working folder
        raise FileNotFoundError(f"{cache} is no absolute path: neither HOME nor XDG_CACHE_HOME says where to keep them")
    return cache, "ultralong"


def temporary_base() -> tuple[Path, str]:
    """The folder for temporary files, and the name of a folder in it.

    Raises:
        FileNotFoundError: There is none that can be written.
    """
    return Path(tempfile.gettempdir()), f"ultralong-{os.getuid()}"


def own_folder(base: Path, *names: str) -> Path:
    """A folder below `base` that only this user can read and write; made where it is not there.

    Args:
        base: A folder that is there, or can be made. No other user may be able to exchange what is in it.
        *names: Of the folders below it, from the outer one to the inner one.

    Raises:
        PermissionError: Another user could write it, or has made it: it is named, with what was found.
        OSError: It can't be made, is not on a disk of this host, or the disk is full.
    """
    base = Path(os.path.realpath(base))
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (base, *base.parents):
        found = place.stat()
        if found.st_uid not in (0, os.getuid()) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            raise PermissionError(f"another user can exchange what is in {place} ({_seen(found)})")
    if (system := file_system(base)) not in LOCAL:
        raise OSError(f"{base} is on {system}, which is not known as a disk of this host")
    if (free := os.statvfs(base).f_bavail * os.statvfs(base).f_frsize) < ROOM:
        raise OSError(f"{base} has {free >> 20} MiB free, {ROOM >> 20} are wanted")
    folder = base
    for name in names:
        folder = folder / name
        with suppress(FileExistsError):  # of an earlier process, or of one that starts now: looked at as any other
            folder.mkdir(mode=0o700)
        found = folder.lstat()  # of a link itself, which is refused: it could lead anywhere
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(
                f"{folder} is no folder that only this user can use ({_seen(found)}): remove it if it is yours"
            )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} can't be written")
    return folder


def _seen(found: os.stat_result) -> str:
    return f"{stat.filemode(found.st_mode)} of user {found.st_uid}"


def file_system(place: Path) -> str:
    """The type of the file system that a folder is on, whose path has no links; "an unknown system" if none is told."""
    nearest, kind = -1, "an unknown system"
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        mounted, _, rest = line.partition(" - ")
        point = Path(mounted.split()[4].replace("\\040", " "))
        if (place == point or point in place.parents) and len(point.parts) >= nearest:
            nearest, kind = len(point.parts), rest.split()[0]  # of mounts on one point the last is what is seen
    return kind
