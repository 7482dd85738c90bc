"""The files of a checkpoint folder: which belong to the model, whether they are whole, and how to copy them.

Nothing here loads a tensor. A safetensors file says in its header which tensors it holds and how long it is, which is
enough to tell a whole file from a cut one and an index that fits its shards from one that doesn't.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ultralong.utils.files import read_json_object
from ultralong.utils.hub import local_folder
from ultralong.utils.text_formats import json_value

INDEX, SINGLE, CARD = "model.safetensors.index.json", "model.safetensors", "README.md"
ADAPTER = "adapter_config.json"
HUB_FOLDER = re.compile(r"(models|datasets|spaces)--")  # name of a repository's folder in the hub's cache
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TENSOR = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}  # any entry that is one
PIECE = 64 << 20  # bytes copied between two movements of the progress bar
CANNOT_COPY_IN_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}

# What a tokenizer, a chat template or a licence lives in. Files of a past training run are no part of the model.
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
LEGAL_NAME = re.compile(r"(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)
TRAINING_LEFTOVERS = re.compile(r"(trainer_state|all_results|(train|eval)_results|extend)\.json")
HUB_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
]


def locate(source: str | os.PathLike[str], revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id (`owner/name`) downloaded into the hub's cache.

    Args:
        source: Folder, hub id or miniature.
        revision: Branch, tag or commit of a hub model.
        config_only: Download no more than config.json.

    Raises:
        ValueError: There is no such folder and no such model within reach.
    """
    folder = local_folder(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file. Pass the folder of a checkpoint (the one that holds config.json).")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise ValueError(f"There is no folder {source}. Pass a checkpoint folder or a hub id such as 'owner/name'.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=["config.json"] if config_only else HUB_PATTERNS,
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"There is no folder {source}, and the hub gave no model of that name ({reason}). Check the "
            "name, log in with `hf auth login` if it is gated, or pass a local folder."
        ) from error


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, the index of a sharded checkpoint included, after checking them.

    Raises:
        ValueError: The weights are missing, cut short, in another format, beside an adapter, or don't fit their index.
    """
    check_no_adapter(folder)
    if (folder / SINGLE).exists():
        if (folder / INDEX).exists():
            raise ValueError(
                f"{folder} holds both {SINGLE} and {INDEX}: two checkpoints seem to be mixed, and programs differ in "
                "which they open. Keep one of them."
            )
        header(folder / SINGLE)
        return [SINGLE]
    if not (folder / INDEX).exists():
        raise ValueError(_why_no_weights(folder))
    index = read_json_object(folder / INDEX)
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has a weight_map that does not name a file for each tensor. Restore it.")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing or not shards:
        lost = f", but {_some(missing)} can't be found in {folder}" if missing else ""
        raise ValueError(f"{INDEX} lists {len(shards)} shards{lost}. Complete the download.")
    names = {path.name for path in folder.iterdir()}
    stray = sorted(name for name in names - set(shards) if SHARD_NAME.fullmatch(name))
    if stray:
        mixed = "Two checkpoints seem to be mixed, or the index is of an older save"
        listed = f"{folder} holds shards that {INDEX} doesn't list: {_some(stray)}"
        raise ValueError(f"{listed}. {mixed}; save the model again into an empty folder.")
    held = {(tensor, name) for name in shards for tensor in header(folder / name)}
    apart = sorted(tensor for tensor, _ in held ^ set(weight_map.items()))
    if apart:
        told = f"{INDEX} and the shards disagree about {_some(apart)}"
        raise ValueError(f"{told}. Save the model again, so that its index fits its files.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{folder / INDEX} has no metadata, without which transformers reads no index. Restore it.")
    return [INDEX, *shards]


def check_no_adapter(folder: Path) -> None:
    """Refuse a model with an adapter in its folder: transformers applies it where peft is installed, servers do not.

    Raises:
        ValueError: There are both.
    """
    if (folder / ADAPTER).exists() and any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise ValueError(
            f"{folder} holds a model and an adapter ({ADAPTER}), which some programs apply and others ignore. Move the "
            "adapter's files into a folder of their own, or merge it into the model (peft: merge_and_unload)."
        )


def companion_files(folder: Path) -> tuple[list[str], list[str]]:
    """What goes along with the weights (tokenizer, templates, code, licence), and what is left behind.

    Returns:
        Two sorted lists of names relative to `folder`. Weights and the model card are in neither.

    Raises:
        ValueError: One of those that go along, or the model card, is a link out of the folder.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    visible = [name for name in names if not name.startswith(".") and "/." not in name]
    taken = [name for name in visible if _goes_along(name)]
    own = {SINGLE, INDEX, CARD}
    left = [name for name in visible if name not in taken and name not in own and not SHARD_NAME.fullmatch(name)]
    check_links(folder, [*taken, *({CARD} & set(visible))])
    return sorted(taken), sorted(left)


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links that lead out of a checkpoint: what is copied from there may be a private file of this machine.

    The hub's cache consists of links, from `models--x/snapshots/REVISION` into `models--x/blobs`: these are followed.

    Args:
        folder: The checkpoint, which may itself be reached by a link.
        names: Its files that are to be copied or read into the copy, relative to `folder`.

    Raises:
        ValueError: One of them is, or lies behind, a link to another place.
    """
    home = folder.resolve()
    places = [home]
    if home.parent.name == "snapshots" and HUB_FOLDER.match(home.parent.parent.name):
        places.append(home.parent.parent / "blobs")
    for name in sorted(names):
        target = (folder / name).resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise ValueError(
                f"{name} in {folder} is a link to {target}, outside of the checkpoint, and would be copied into a "
                "model that may be published. Put the file itself in its place if it belongs to the model; otherwise "
                "remove the link."
            )


def copy_file(source: Path, target: Path, moved: Callable[[int], Any]) -> None:
    """Copy one file in pieces, within the kernel where it can, and put it on the disk before returning.

    Args:
        source: File, or link to one that `check_links` has passed.
        target: Its folder is created when missing.
        moved: Called with the bytes of each piece.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left > 0:
            count = _copy_piece(reader.fileno(), writer.fileno(), min(PIECE, left))
            if count == 0:
                raise ValueError(f"{source} became shorter while being copied. Try again when nothing writes to it.")
            left -= count
            moved(count)
        os.fsync(writer.fileno())


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start a copy that can't end.

    Raises:
        ValueError: The disk of `folder` has fewer than `needed` bytes left.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"The checkpoint needs {needed / 1e9:.2f} GB at {folder}, where {free / 1e9:.2f} GB are free.")


def _copy_piece(reader: int, writer: int, count: int) -> int:
    try:
        return os.copy_file_range(reader, writer, count)
    except OSError as error:
        if error.errno not in CANNOT_COPY_IN_KERNEL:
            raise
    piece = os.read(reader, min(count, 8 << 20))
    left = memoryview(piece)
    while left:
        left = left[os.write(writer, left) :]
    return len(piece)


def _goes_along(name: str) -> bool:
    path = Path(name)
    if path.parent != Path(".") and path.parts[0] != "additional_chat_templates":
        return False
    if TRAINING_LEFTOVERS.fullmatch(name) or name.endswith(".index.json"):
        return False
    return path.suffix in COMPANION_SUFFIXES or bool(LEGAL_NAME.match(path.name))


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: type, shape and place of each tensor by its name.

    Raises:
        ValueError: It is no such file, or not as long as its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, 100 << 20):
            raise ValueError(
                f"{path} is not a safetensors file, or was cut off in its header ({size} bytes). If it is "
                "a Git LFS pointer, run `git lfs pull`; otherwise download it again."
            )
        try:
            entries = json_value(stream.read(header_size))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged safetensors header ({error}). Download it again.") from error
    if not isinstance(entries, dict) or not all(map(_is_tensor, (entries | {"__metadata__": TENSOR}).values())):
        raise ValueError(f"{path} has a damaged safetensors header (entries of wrong types). Download it again.")
    entries.pop("__metadata__", None)
    if size != (expected := 8 + header_size + max((one["data_offsets"][1] for one in entries.values()), default=0)):
        raise ValueError(f"{path} has {size} bytes, but its header describes {expected}: download it again.")
    try:
        with safe_open(path, "np"):  # the format's own rules: known types, sizes that fit them, no gaps
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} has a damaged safetensors header ({error}). Download it again.") from error
    return dict(entries)


def _is_tensor(entry: Any) -> bool:
    """Whether an entry of a header has the shape of one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    ends, shape = entry.get("data_offsets"), entry.get("shape")
    if not isinstance(ends, list) or not isinstance(shape, list) or len(ends) != 2:
        return False
    return all(type(number) is int for number in (*ends, *shape))


def _why_no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    convert = "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(NEW) in transformers writes safetensors"
    if any(SHARD_NAME.fullmatch(name) for name in names):
        return f"{folder} holds shards but no {INDEX}. Complete the download: transformers can't open it either."
    pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
    if pickled:
        return (
            f"The weights in {folder} are pickled ({_some(pickled)}), which can run code when opened. Convert them "
            f"once: {convert}."
        )
    if any(name.endswith(".gguf") for name in names):
        return f"The weights in {folder} are a GGUF file. Convert them once (pass gguf_file=NAME): {convert}."
    if ADAPTER in names:
        return f"{folder} holds an adapter, not a model. Merge it into its base first (peft: merge_and_unload)."
    return f"{folder} holds no {SINGLE} and no {INDEX}, so it is not a whole checkpoint."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
