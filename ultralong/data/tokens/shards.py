"""A folder of numbered shards, each written whole, so that work resumes after a crash.

Token stores and packed rows share this: files `NAME-00000.*` plus one record `NAME-00000.json`, which is written last.
A shard counts from the moment its record exists; other files of such names are left over from a crash and are removed
before work goes on, and files of any other name are left alone. A shard whose files are missing, cut or changed does
not count either: it and those after it are made again. `settings.json` says what the shards were made from, so that a
folder is never continued with other settings, and `manifest.json` appears when everything is done. Nothing written
holds a time or a machine's name: the same input gives the same bytes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ultralong.utils.files import make_folder, read_json, sha256, write_json

# Keys of settings, records and manifests that version 0.3 wrote, and their names of today.
OLD_KEYS = {"joints": "separators", "joint_tokens": "separator_tokens", "window_rows": "buffer_rows"}

# Keys that 0.3 did not write: where they are missing they are not compared.
NEW_KEYS = frozenset({"date"})

# Endings of a shard's files, and what else is written beside the shards: what a crash may leave is known by its name.
ENDINGS = ("json", "bin", "offsets.npy", "documents.jsonl", "npy", "segments.npy", "targets.npy")
RECORD = re.compile(r"[a-z]+-\d{5,}\.json")
BESIDE = ("settings.json", "manifest.json", "sources.json", "report.json", "recipe.yaml")


MOST_TOLD, MOST_CHARACTERS = 4, 80  # of what differs: how many values, and of each how much


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings, a shard's record or a manifest, whichever version wrote it, with keys of today.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return {OLD_KEYS.get(str(key), str(key)): value for key, value in found.items()}


class ShardFolder:
    """One folder of shards under construction.

    Args:
        folder: Where the shards lie; created when missing.
        prefix: Name in front of the shard number, such as `"tokens"`.
        settings: Everything the bytes depend on, as plain JSON values.
        upgrade_provenance: Brings the provenance in a folder's settings, which an earlier version may have written,
            into the form of today before it is compared; None compares it as it is.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prefix: str,
        settings: dict[str, Any],
        upgrade_provenance: Callable[[Any], Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.prefix = prefix
        self.settings = settings
        self.upgrade_provenance = upgrade_provenance or (lambda provenance: provenance)

    def manifest(self, ignore: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """The manifest of a finished folder made with the same settings, or None when there is work to do.

        Its files are compared with their sizes and hashes. Where one differs the folder is no longer finished.

        Args:
            ignore: Settings that are not compared, because they are not known yet.

        Raises:
            ValueError: The folder was made with other settings.
        """
        self._check_settings(ignore)
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        found = read_record(path)
        for record in found["shards"]:
            if (wrong := self._wrong(record)) is not None:
                print(f"note: {wrong}: it is made again, with what comes after it.", file=sys.stderr)
                path.unlink()
                return None
        return found

    def resume(self) -> list[dict[str, Any]]:
        """Records of the shards already whole, in order; what a crash left behind is removed.

        Raises:
            ValueError: The folder was made with other settings, or holds files of such names without any settings.
        """
        self._check_settings()
        make_folder(self.folder)
        own = re.compile(rf"{re.escape(self.prefix)}-\d{{5,}}\.(?:{'|'.join(map(re.escape, ENDINGS))})")
        beside = "|".join(re.escape(name) for name in BESIDE)
        partial = re.compile(rf"\.(?:{own.pattern}|{beside})(?:\.\w+)?\.partial")
        files = [path for path in self.folder.iterdir() if path.is_file() or path.is_symlink()]
        if not (self.folder / "settings.json").exists():
            foreign = sorted(path.name for path in files if own.fullmatch(path.name))
            if foreign:
                raise ValueError(
                    f"{self.folder} holds {foreign[0]}, which this run did not write. Choose another folder."
                )
        write_json(self.folder / "settings.json", self.settings)
        records: list[dict[str, Any]] = []
        while (path := self.path(len(records), "json")).exists():
            record = read_record(path)
            if (wrong := self._wrong(record)) is not None:
                print(f"note: {wrong}: it is made again, with what comes after it.", file=sys.stderr)
                break
            records.append(record)
        whole = {self.name(number) for number in range(len(records))}
        for path in files:
            orphan = own.fullmatch(path.name) and path.name.split(".")[0] not in whole
            if orphan or partial.fullmatch(path.name):
                path.unlink()
        return records

    def _wrong(self, record: dict[str, Any]) -> str | None:
        """What differs between a shard's record and its files, or None."""
        return next(
            (wrong for name, expected in record["files"].items() if (wrong := _differs(self.folder / name, expected))),
            None,
        )

    def commit(self, number: int, partials: dict[str, Path], record: dict[str, Any]) -> dict[str, Any]:
        """Move a shard's finished files into place and write its record, with their sizes and hashes, last.

        Args:
            number: The shard's number.
            partials: For each file ending such as `"bin"`, the temporary file that becomes it.
            record: What to remember about the shard.

        Returns:
            The record as written.
        """
        files = {}
        for ending, partial in partials.items():
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            files[self.path(number, ending).name] = {"bytes": partial.stat().st_size, "sha256": sha256(partial)}
            os.replace(partial, self.path(number, ending))
        record = {"shard": self.name(number), **record, "files": files}
        write_json(self.path(number, "json"), record)
        return record

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, which marks the folder as complete."""
        write_json(self.folder / "manifest.json", manifest)
        return manifest

    def name(self, number: int) -> str:
        """Name of a shard without its ending."""
        return f"{self.prefix}-{number:05d}"

    def path(self, number: int, ending: str) -> Path:
        """Path of one of a shard's files."""
        return self.folder / f"{self.name(number)}.{ending}"

    def partial(self, number: int, ending: str) -> Path:
        """Path of the same file while it is being written."""
        return self.folder / f".{self.name(number)}.{ending}.partial"

    def _check_settings(self, ignore: tuple[str, ...] = ()) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            if (self.folder / "manifest.json").exists():
                raise ValueError(f"{self.folder} has a manifest.json but no settings.json. Choose another folder.")
            return
        found = read_record(path)
        if "provenance" in found:
            found["provenance"] = self.upgrade_provenance(found["provenance"])
        keys = {*found, *self.settings} - {*ignore} - (NEW_KEYS - found.keys())
        changed = sorted(key for key in keys if found.get(key) != self.settings.get(key))
        if changed:
            told = list(
                dict.fromkeys(line for key in changed for line in changes(key, found.get(key), self.settings.get(key)))
            )
            more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
            raise ValueError(
                f"{self.folder} was made with other settings: {'; '.join(told[:MOST_TOLD])}{more}. Choose another "
                "folder, or delete it."
            )


def changes(name: str, before: Any, now: Any) -> Iterator[str]:
    """What differs between two records of settings, down to the single values.

    Args:
        name: What both are called.
        before: The one.
        now: The other.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (*before, *(key for key in now if key not in before)):
            yield from changes(f"{name}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from changes(f"{name}[{place}]", one, other)
    elif before != now:
        yield f"{name} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def verify(folder: str | os.PathLike[str]) -> int:
    """Check every file that a finished folder's manifest names against its size and hash.

    Args:
        folder: A token store or a folder of packed rows.

    Returns:
        How many files were checked.

    Raises:
        ValueError: A file is missing or differs; the message names it.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} holds no finished shards (no manifest.json).")
    checked = 0
    for wrong in _compared(folder):
        if wrong is not None:
            raise ValueError(f"{wrong}. Run the command that made {folder} again: it makes it whole.")
        checked += 1
    return checked


def shard_faults(folder: Path) -> tuple[int, list[str]]:
    """Compare the shards of a folder, finished or not, with the sizes and hashes in its manifest or their records.

    Returns:
        How many files are recorded, and a line for each that is missing, cut or changed.

    Raises:
        ValueError: The manifest, or a shard's record, cannot be read.
    """
    found = list(_compared(folder))
    return len(found), [wrong for wrong in found if wrong is not None]


def _compared(folder: Path) -> Iterator[str | None]:
    """For each file that is recorded: how it differs, or None."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        records = read_record(manifest).get("shards")
    else:
        records = [read_record(path) for path in sorted(folder.glob("*.json")) if RECORD.fullmatch(path.name)]
    try:
        recorded = {name: expected for record in records or () for name, expected in record["files"].items()}
        for name, expected in recorded.items():
            yield _differs(folder / name, expected)
    except (KeyError, TypeError, AttributeError) as error:
        place = manifest if manifest.is_file() else folder
        raise ValueError(f"{place} is no record of shards with sizes and hashes ({error!r}). Restore it.") from error


def _differs(path: Path, expected: dict[str, Any]) -> str | None:
    """How a file differs from its record; the size first, which costs nothing."""
    check = check_size(path, expected)
    if check is None and sha256(path) != expected["sha256"]:
        return f"{path} differs from its record (sha256)"
    return check


def check_size(path: Path, expected: dict[str, Any]) -> str | None:
    """How a file's size differs from its record, or None; a look at the folder, whatever the size."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path} has {path.stat().st_size:,} bytes, its record says {expected['bytes']:,}"
    return None
