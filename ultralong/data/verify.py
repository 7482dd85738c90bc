"""A folder that any command wrote, compared with the sizes and hashes that are recorded in it.

Rows and token stores, runs with their training checkpoints and their model, models by themselves.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralong.checkpoints.distributed import STATE
from ultralong.checkpoints.verify import model_faults, training_checkpoint_faults
from ultralong.data.tokens.shards import shard_faults
from ultralong.utils.files import read_jsonl

SHARDS = "as their manifest says"
UNFINISHED = "as the records of its shards say (it is not finished: there is no manifest.json)"
STEP = "as its state.json says"
MODEL = "whole by their headers and index (weights have no recorded hash)"


@dataclass(frozen=True)
class Checked:
    """One folder that was compared.

    Attributes:
        folder: The folder.
        files: Files that were looked at.
        against: What they were compared with, as the end of a sentence.
        faults: A line for each file that is missing, cut or changed.
    """

    folder: str
    files: int
    against: str
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """What was checked, on one line."""
        if self.faults:
            return f"{self.folder}: {self.files:,} files, {len(self.faults)} wrong"
        if not self.files:
            return f"{self.folder}: nothing to compare, as no sizes or hashes are recorded in it"
        return f"{self.folder}: {self.files:,} files, all {self.against}"


@dataclass(frozen=True)
class Verification:
    """What `verify` compared.

    Attributes:
        checked: The folders, in the order in which they were compared.
    """

    checked: tuple[Checked, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """One line for each file that is missing, cut or changed; empty where all is well."""
        return tuple(fault for one in self.checked for fault in one.faults)

    def __str__(self) -> str:
        """One line for each folder."""
        return "\n".join(map(str, self.checked))

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and strings, ready for JSON."""
        return asdict(self)


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Compare every file whose size or hash is recorded in a folder with what is on the disk.

    Args:
        folder: Packed rows or a token store; a run with its checkpoints and model; one training checkpoint; a model.

    Raises:
        ValueError: There is no such folder, or it is none of these.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}.")
    checked = _shards(path) + _shards(path / "tokens") + _run(path) + _model(path)
    if not checked:
        raise ValueError(
            f"{path} holds nothing to compare: no finished shards (manifest.json), no training checkpoints "
            "(checkpoints/step-*) and no model (config.json). Pass the folder that a command wrote."
        )
    return Verification(tuple(checked))


def _shards(folder: Path) -> list[Checked]:
    manifest = (folder / "manifest.json").is_file()
    if not manifest and not (folder / "settings.json").is_file():
        return []
    try:
        files, faults = shard_faults(folder)
    except ValueError as error:
        files, faults = 0, [str(error)]
    return [Checked(str(folder), files, SHARDS if manifest else UNFINISHED, tuple(faults))]


def _run(folder: Path) -> list[Checked]:
    steps = sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())
    if (folder / STATE).is_file():
        steps = [folder, *steps]
    checked = []
    for step in steps:
        files, faults = training_checkpoint_faults(step)
        checked.append(Checked(str(step), files, STEP, tuple(faults)))
    log = folder / "log.jsonl"
    if log.is_file():
        checked.append(Checked(str(log), 1, "whole lines of JSON", _log_faults(log)))
    return checked + _model(folder / "model")


def _log_faults(log: Path) -> tuple[str, ...]:
    try:
        read_jsonl(log)
    except ValueError as error:
        return (str(error),)
    return ()


def _model(folder: Path) -> list[Checked]:
    if not (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*")):
        return []
    files, faults = model_faults(folder)
    return [Checked(str(folder), files, MODEL, tuple(faults))]
