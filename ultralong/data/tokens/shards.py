"""A folder of numbered shards, each written whole, so that work resumes after a crash.

Token stores and packed rows share this: files `NAME-00000.*` plus one record `NAME-00000.json`, which is written last.
A shard counts from the moment its record exists; anything else in the folder is left over from a crash and is removed
before work goes on. `settings.json` says what the shards were made from, so that a folder is never continued with
other settings, and `manifest.json` appears when everything is done. Nothing written holds a time or a machine's name:
the same input gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralong.utils.files import read_json, sha256, write_json

# Keys of settings, records and manifests that version 0.3 wrote, and their names of today.
OLD_KEYS = {"joints": "separators", "joint_tokens": "separator_tokens", "window_rows": "buffer_rows"}

# Keys that 0.3 did not write: where they are missing they are not compared.
NEW_KEYS = frozenset({"date"})


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

        Args:
            ignore: Settings that are not compared, because they are not known yet.

        Raises:
            ValueError: The folder was made with other settings.
        """
        self._check_settings(ignore)
        path = self.folder / "manifest.json"
        return read_record(path) if path.exists() else None

    def resume(self) -> list[dict[str, Any]]:
        """Records of the shards already whole, in order; what a crash left behind is removed.

        Raises:
            ValueError: The folder was made with other settings.
        """
        self._check_settings()
        write_json(self.folder / "settings.json", self.settings)
        records: list[dict[str, Any]] = []
        while (path := self.path(len(records), "json")).exists():
            records.append(read_record(path))
        whole = {self.name(number) for number in range(len(records))}
        for path in self.folder.iterdir():
            partial = path.name.startswith(".") and path.name.endswith(".partial")
            orphan = path.name.startswith(f"{self.prefix}-") and path.name.split(".")[0] not in whole
            if partial or orphan:
                path.unlink()
        return records

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
            lines = "; ".join(f"{key} was {found.get(key)!r}, now {self.settings.get(key)!r}" for key in changed)
            raise ValueError(
                f"{self.folder} was made with other settings ({lines}). Choose another folder, or delete it."
            )


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
    checked = 0
    for shard in read_record(folder / "manifest.json")["shards"]:
        for name, expected in shard["files"].items():
            path = folder / name
            if not path.exists():
                raise ValueError(f"{path} is missing. Delete {folder} and build it again.")
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                raise ValueError(f"{path} differs from its manifest. Delete {folder} and build it again.")
            checked += 1
    return checked
