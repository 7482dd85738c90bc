"""Rows of a published set: from a local folder or the hub, read one at a time.

The longest sets hold hundreds of megabytes, so a file is searched for line ends once and only the rows asked for are
read.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralong.data.read.fetch import DEFAULT_CACHE
from ultralong.utils.files import atomic_path

# Where the authors keep their data. LV-Eval's lies in archives behind a loading script, which `datasets` no longer
# runs, so files are fetched as they are.
HUBS = {"lveval": "Infinigence/LVEval", "infinitebench": "xinrongzhang2022/InfiniteBench"}


class Rows(Sequence[dict[str, Any]]):
    """Records of a JSON-lines file.

    Args:
        path: The file.

    Raises:
        ValueError: It holds no lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = []
        place = 0
        with open(path, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._starts.append(place)
                place += len(line)
        if not self._starts:
            raise ValueError(f"{path} holds no rows: fetch it again.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as stream:
            stream.seek(self._starts[index])
            try:
                row = json.loads(stream.readline())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path}, row {index + 1}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index + 1}: not a record of fields.")
        return row


def find_file(benchmark: str, name: str, archive: str | None, given: Path | None) -> Path:
    """The file of one set.

    Args:
        benchmark: `lveval` or `infinitebench`.
        name: Name of the set with its level, such as `cmrc_mixup_16k`; the file is `NAME.jsonl`.
        archive: Name of the zip archive that holds it, where the authors publish it so.
        given: The file itself, or a folder that holds it or its archive at any depth; None asks the hub.

    Raises:
        ValueError: It is not there, or neither in the hub's cache nor to be fetched.
    """
    if given is None:
        return _from_hub(benchmark, name, archive)
    if given.is_file() and given.suffix != ".zip":
        return given
    folder = given.parent if given.is_file() else given
    if (found := min(folder.rglob(f"{name}.jsonl"), default=None)) is not None:
        return found
    if archive is not None and (found := min(folder.rglob(archive), default=None)) is not None:
        return _unzipped(found, name)
    wanted = f"{name}.jsonl" + ("" if archive is None else f" or {archive}")
    raise ValueError(f"{given} holds no {wanted}: put it there, from the hub's data set {HUBS[benchmark]}.")


def _from_hub(benchmark: str, name: str, archive: str | None) -> Path:
    import huggingface_hub

    wanted = archive or f"{name}.jsonl"
    try:
        found = Path(huggingface_hub.hf_hub_download(HUBS[benchmark], wanted, repo_type="dataset"))
    # The hub's own errors are OSError and ValueError by turns.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is published data that is neither on this machine nor to be fetched from the hub "
            f"({type(error).__name__}). Fetch {wanted} of the data set {HUBS[benchmark]} elsewhere, put "
            "it into a folder, and name that with --questions (or --data)."
        ) from error
    return found if archive is None else _unzipped(found, name)


def _unzipped(archive: Path, name: str) -> Path:
    """One member of an archive, laid out in the cache."""
    try:
        with zipfile.ZipFile(archive) as opened:
            member = next((info for info in opened.infolist() if Path(info.filename).name == f"{name}.jsonl"), None)
            if member is None:
                raise ValueError(f"{archive} holds no {name}.jsonl.")
            target = DEFAULT_CACHE.expanduser() / "unpacked" / f"{name}-{member.CRC:08x}.jsonl"
            if not target.exists():
                with opened.open(member) as packed, atomic_path(target) as partial, open(partial, "wb") as stream:
                    shutil.copyfileobj(packed, stream)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a whole zip archive: fetch it again.") from error
    return target
