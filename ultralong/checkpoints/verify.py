"""What is wrong with the files of a checkpoint, by what is recorded of them: all faults, not the first alone.

Training checkpoints record a size and a hash of each file. A model's folder records less: safetensors headers say how
long a file is and which tensors it holds, an index says where each tensor is, the hub's cache names large files by
their hash, and `extend.json` names the files that were written.
"""

from __future__ import annotations

import re
from pathlib import Path

from ultralong.checkpoints.distributed import STATE, changed_files, recorded_files
from ultralong.checkpoints.files import INDEX, SINGLE, header, weight_files
from ultralong.utils.files import read_json, read_json_object, sha256

HASH = re.compile(r"[0-9a-f]{64}")  # the hub's cache names files of Git LFS by their SHA-256, others by another hash
NAMED_FILES = "extend.json"
OBJECTS = ("config.json", "tokenizer_config.json", "generation_config.json", NAMED_FILES)


def training_checkpoint_faults(folder: Path) -> tuple[int, list[str]]:
    """Compare a training checkpoint (`step-0000100`) with the sizes and hashes in its `state.json`.

    Returns:
        How many files are recorded, and a line for each that is missing, cut or changed. A checkpoint of a version that
        recorded nothing has 0 files.
    """
    try:
        read_json_object(folder / STATE)
    except (OSError, ValueError) as error:
        return 0, [f"{folder / STATE}: {' '.join(str(error).split())}"]
    return len(recorded_files(folder)), [f"{folder}: {wrong}" for wrong in changed_files(folder)]


def model_faults(folder: Path) -> tuple[int, list[str]]:
    """Compare a model's weights with their headers and index; its JSON has to be JSON, and files that are named there.

    Returns:
        How many files were looked at, and a line for each fault.
    """
    weights = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    texts = sorted(path for path in folder.glob("*.json") if path.name != INDEX)
    faults = [line for path in texts if (line := _json_fault(path)) is not None]
    heads = {path: _weights_fault(path) for path in weights}
    faults += [line for line in heads.values() if line is not None]
    if not any(heads.values()):
        faults += _index_faults(folder)
    named = folder / NAMED_FILES
    if named.is_file() and not any(line.startswith(str(named)) for line in faults):
        listed = read_json_object(named).get("files")
        names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        known = {SINGLE, INDEX, *(path.name for path in weights)}  # spoken of above
        gone = [name for name in names if name not in known and not (folder / name).is_file()]
        faults += [f"{folder / name} is missing: {NAMED_FILES} names it" for name in gone]
    return len(weights) + len(texts) + (folder / INDEX).is_file(), faults


def _json_fault(path: Path) -> str | None:
    try:
        (read_json_object if path.name in OBJECTS else read_json)(path)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        return text if text.startswith(str(path)) else f"{path}: {text}"
    return None


def _weights_fault(path: Path) -> str | None:
    """What is wrong with one safetensors file by itself; in the hub's cache its hash is compared."""
    try:
        header(path)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    blob = path.resolve()
    if path.is_symlink() and HASH.fullmatch(blob.name) and sha256(blob) != blob.name:
        return f"{path} is not what was downloaded (its hash differs): download it again"
    return None


def _index_faults(folder: Path) -> list[str]:
    try:
        names = weight_files(folder)
    except (OSError, ValueError) as error:
        return [" ".join(str(error).split())]
    stray = sorted({path.name for path in folder.glob("*.safetensors")} - {*names})
    return [f"{folder / name} belongs to no index: a stray shard, or of another model" for name in stray]
