"""Checkpoints of a run, as torch's distributed checkpoint writes them: read without running code, and compared by hash.

torch reads `.metadata` and every entry that is no tensor with pickle, so that a run folder of somebody else could run
what it likes when it is resumed. Here both are read by names that such a checkpoint needs, and by no other.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from ultralong.utils.files import read_json, sha256, write_json

STATE = "state.json"
# How damaged files show when they are read.
FORMAT_ERRORS = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError, SafetensorError)
TORCH_FORMAT_ERRORS = ("PytorchStreamReader",)  # torch raises plain RuntimeErrors for broken zip archives
STEP = re.compile(r"step-(\d+)")
PART = re.compile(r"__(\d+)_\d+\.distcp|random-(\d+)\.safetensors")
# All that pickle may look up for a checkpoint's metadata, besides torch's names of number types.
NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


class _NamedOnly(pickle.Unpickler):
    """Unpickles what metadata is made of; any other name ends it before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        if name in NAMES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs")


class StateReader(FileSystemReader):
    """torch's reader of a checkpoint folder, for folders that anybody may have written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the folder.

        Raises:
            pickle.UnpicklingError: It holds something else than a checkpoint's metadata, or names a file elsewhere.
        """
        with open(Path(self.path) / ".metadata", "rb") as stream:
            metadata = _NamedOnly(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}, no checkpoint's metadata")
        for item in (metadata.storage_data or {}).values():
            if Path(item.relative_path).name != item.relative_path:
                raise pickle.UnpicklingError(f".metadata names the file {item.relative_path!r} outside its folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class StatePlanner(DefaultLoadPlanner):
    """torch's planner, for which an entry that is no tensor is a number, a text or a collection of these."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one entry into the state that is being loaded."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def hash_own_files(folder: Path, rank: int, written: Mapping[str, str] | None = None) -> None:
    """Write the sizes and hashes of the files that one process wrote beside them, for `record_hashes`.

    Args:
        folder: The checkpoint, unfinished; all of the process's files are there.
        rank: The process. The first one answers for files of no process as well.
        written: SHA-256 by file name, of those that were hashed as they were written. The others are read for it.
    """
    known = written or {}
    own = [file for file in sorted(folder.iterdir()) if _owner(file.name) == rank and _is_kept(file.name)]
    facts = {file.name: {"bytes": file.stat().st_size, "sha256": known.get(file.name) or sha256(file)} for file in own}
    write_json(folder / f"hashes-{rank}.json", facts)


def record_hashes(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint's `state.json`, with what all processes have left by `hash_own_files`.

    Every file is on the disk when this returns, so that the rename that follows cannot land before their content.
    """
    files: dict[str, Any] = {}
    for part in sorted(folder.glob("hashes-*.json")):
        files |= read_json(part)
        part.unlink()
    write_json(folder / STATE, {**state, "files": files})
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def changed_file(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files by their recorded sizes and hashes; None where nothing is.

    Args:
        folder: A checkpoint. One of a version without hashes has nothing to compare.
        rank: This process, which looks at its share of the files.
        ranks: Processes that share them.
    """
    return next(changed_files(folder, rank, ranks), None)


def changed_files(folder: Path, rank: int = 0, ranks: int = 1) -> Iterator[str]:
    """What is wrong with each file of a checkpoint, as `changed_file` says it of the first."""
    if rank == 0 and (wrong := _other_step(folder)):
        yield wrong
    for name in sorted(recorded := recorded_files(folder))[rank::ranks]:
        file, facts = folder / name, recorded[name]
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != facts["bytes"]:
            yield f"{name} has {file.stat().st_size:,} bytes where {facts['bytes']:,} were written"
        elif sha256(file) != facts["sha256"]:
            yield f"{name} is not what was written (its hash differs)"


def _other_step(folder: Path) -> str | None:
    """Whether `state.json` is of another step than the folder, which would be trained on from the wrong place."""
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError):  # the caller's own reading of the file says what is wrong
        return None
    named = STEP.fullmatch(folder.name)
    if named is None or not isinstance(state, dict) or "step" not in state:
        return None
    step, processes = state["step"], state.get("processes", 1)
    if type(step) is not int:
        return f"{STATE} lacks the step or the number of processes"
    if step != int(named[1]):
        return f"{STATE} is of step {step}"
    return None if type(processes) is int and processes > 0 else f"{STATE} is of {processes!r} processes"


def recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash by file name, as `state.json` has them; empty where it has none or is no such file."""
    try:
        files = read_json(folder / STATE)["files"]
    except (OSError, ValueError, KeyError, TypeError):  # the caller's own reading of the file says what is wrong
        return {}
    whole = isinstance(files, dict) and all(
        Path(name).name == name and isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
        for name, facts in files.items()
    )
    return files if whole else {}


def damage_behind(path: Path, error: BaseException) -> str | None:
    """What is wrong with a checkpoint's files, given the error that loading it raised; None where they are whole.

    Only a failed format counts. Removing a checkpoint must never be advised because memory or a connection gave out.
    """
    if isinstance(error, FORMAT_ERRORS) or any(text in str(error) for text in TORCH_FORMAT_ERRORS):
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'a file ends too early')}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError | ConnectionError | dist.DistError):
        return None
    try:
        state = read_json(path / "state.json")
        if not isinstance(state, dict) or any(type(state.get(name)) is not int for name in ("step", "processes")):
            return "state.json lacks the step or the number of processes"
        items = StateReader(path).read_metadata().storage_data or {}
    except (FileNotFoundError, ValueError, TypeError, KeyError, IndexError, *FORMAT_ERRORS) as found:
        return f"{type(found).__name__}: {found}"
    ends: dict[str, int] = {}
    for item in items.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, size in ends.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size < size:
            return f"{name} has {(path / name).stat().st_size:,} bytes where {size:,} were written"
    randoms = [path / f"random-{rank}.safetensors" for rank in range(state["processes"])]
    if missing := [file.name for file in randoms if not file.is_file()]:
        return f"{missing[0]} is missing"
    return next((f"{file.name} holds no random state" for file in randoms if "cpu" not in load_file(file)), None)


def first_cause(error: BaseException, rank: int) -> BaseException:
    """What a checkpoint exception of torch was raised for: this rank's failure, else the first rank's that failed."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return error
    return error.failures.get(rank, next(iter(error.failures.values())))[0]


def _is_kept(name: str) -> bool:
    """Whether a file belongs to the checkpoint; the others are the notes of processes, being written beside it."""
    return name == ".metadata" or not name.startswith((".", "hashes-"))


def _owner(name: str) -> int:
    found = PART.fullmatch(name)
    return int(found[1] or found[2]) if found else 0
