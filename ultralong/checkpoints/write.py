"""The one way a checkpoint is written: extended, trained, or made by the demo and the miniature.

Config, tokenizer, templates and licence come from a source folder, file by file, so that what is not meant to change
does not; weights and model card come from the caller. The folder is built beside its final place and moved there in
one step: it is complete or it does not exist.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ultralong.checkpoints.config import check_companions, config_for_readers, tokenizer_for_readers, weights_dtype
from ultralong.checkpoints.files import CARD, check_links, check_space, companion_files, copy_file, weight_files
from ultralong.utils.files import atomic_path, file_lock, read_json_object, write_text
from ultralong.utils.progress import library_bars, progress

EDITED = ("config.json", "tokenizer_config.json", "generation_config.json")


def write_checkpoint(
    out: str | os.PathLike[str],
    source: Path,
    weights: Callable[[Path], None],
    card: Callable[[Path], str],
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    needed: int = 0,
    replace: bool = False,
) -> Path:
    """Write a checkpoint folder that transformers 4 and 5, and servers built on them, read alike.

    Args:
        out: The folder, which must not exist or be empty: a link is followed. With `replace`, whatever is there goes;
            a link is replaced, not what it points to.
        source: Folder whose config, tokenizer, templates, generation config and licence go along.
        weights: Writes the weights into the folder that it is given: `copy_weights` or `save_weights`.
        card: Text of the model card, once everything else is in the folder that it is given.
        changes: New entries by the name of the JSON file that they belong to; a file that the source lacks is left out.
        needed: Bytes that the disk must have.
        replace: Put the new folder in the place of what is there.

    Returns:
        The folder.

    Raises:
        ValueError: `out` is in use, another run is writing it, or the disk is too small. Nothing is written then.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    if not replace:
        target = Path(os.path.realpath(target))
        check_free(target)
    companions, _ = companion_files(source)
    check_companions(source, companions)
    with _folder_beside(target, needed) as folder:
        for name in companions:
            if name not in EDITED:
                copy_file(source / name, folder / name, lambda count: None)
        for name in EDITED:
            if (source / name).is_file():
                entries = read_json_object(source / name) | dict((changes or {}).get(name, {}))
                if name == "tokenizer_config.json":
                    entries = tokenizer_for_readers(entries, _text(source / "chat_template.jinja"))
                write_entries(folder / name, entries)
        weights(folder)
        entries = config_for_readers(read_json_object(folder / "config.json"), weights_dtype(folder))
        write_entries(folder / "config.json", entries)
        write_text(folder / CARD, card(folder))
        if replace:
            _remove(target)
    return target


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that is complete or does not exist, in the place of what is there.

    Args:
        out: The folder.
        fill: Writes its files into the folder that it is given.
    """
    target = Path(os.path.abspath(out))
    with _folder_beside(target, 0) as folder:
        fill(folder)
        _remove(target)


def write_entries(file: Path, entries: Mapping[str, Any]) -> None:
    """Write a file of a checkpoint's settings.

    Infinity stays as the source spells it, though JSON has none: Mamba's time_step_limit is [0.0, Infinity].
    """
    write_text(file, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}). Restore it.") from error


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)


def check_free(target: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ValueError: `target` is a file, or a folder that is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"The output {target} exists and is not an empty folder. Choose another, or delete it first.")


def copy_weights(source: Path, quiet: bool = True) -> Callable[[Path], None]:
    """For `write_checkpoint`: the source's weight files as they are, never loaded, so memory stays flat at any size.

    Raises:
        ValueError: The weights are missing, damaged, or links out of the source.
    """
    names = weight_files(source)
    check_links(source, names)

    def copy(folder: Path) -> None:
        total = sum((source / name).stat().st_size for name in names)
        with progress(total=total, desc="copying", unit="B", unit_scale=True, unit_divisor=1024, quiet=quiet) as bar:
            for name in names:
                copy_file(source / name, folder / name, bar.update)

    return copy


def save_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Callable[[Path], None]:
    """For `write_checkpoint`: a model's weights, split into files and named as transformers does.

    Args:
        model: Says how tensors are named on disk.
        weights: Its parameters and buffers, whole, each once, in the type to write.
    """

    def save(folder: Path) -> None:
        apart = folder / ".weights"
        # transformers refuses to save some generation configs that it loads; the source's file is copied anyway.
        kept, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with library_bars():
                model.save_pretrained(apart, state_dict=dict(weights))
        finally:
            model.generation_config = kept
        for name in weight_files(apart):
            with atomic_path(folder / name) as temporary:  # safetensors makes files that their owner alone may read
                os.replace(apart / name, temporary)
        shutil.rmtree(apart)

    return save


@contextmanager
def _folder_beside(target: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` when the block ends without an error.

    A run that was killed leaves its folder behind without the lock on it; the next run to the same place clears it.
    """
    temporary = target.parent / f".{target.name}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    busy = f"Another run is writing {target} right now. Wait for it or choose another."
    with file_lock(target.parent / f".{target.name}.lock", busy, remove=True):
        if temporary.is_symlink():
            raise ValueError(f"{temporary} is a link, and what is behind it would be removed. Remove the link.")
        temporary.mkdir(exist_ok=True)
        try:
            for left in temporary.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            check_space(temporary, needed)
            yield temporary
            os.replace(temporary, target)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
