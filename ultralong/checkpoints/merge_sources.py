"""What `merge` reads from: a model's safetensors files or a checkpoint of a run, a tensor at a time."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from ultralong.checkpoints.config import DTYPES
from ultralong.checkpoints.distributed import STATE, StatePlanner, StateReader, changed_file
from ultralong.checkpoints.files import INDEX, header, locate, weight_files
from ultralong.utils.text_formats import read_yaml

PREFIX = "model.model."  # of a run's checkpoint: the model is inside the module that computes the loss


class Source(Protocol):
    """A checkpoint whose tensors are read one by one."""

    @property
    def title(self) -> str:
        """Short name."""

    @property
    def folder(self) -> Path:
        """Folder with its config, tokenizer and model card."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name on the disk."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor of the folder's model is written."""


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint folder with safetensors weights."""

    title: str
    folder: Path

    @cached_property
    def _places(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """File and header entry of each tensor."""
        names = [name for name in weight_files(self.folder) if name != INDEX]
        return {tensor: (name, entry) for name in names for tensor, entry in header(self.folder / name).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name on the disk."""
        return {name: tuple(entry["shape"]) for name, (_, entry) in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        with safe_open(self.folder / self._places[name][0], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is written in."""
        return DTYPES[self._places[name][1]["dtype"]]


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, as the trainer leaves it; its folder is that of the model that the run started from."""

    title: str
    folder: Path
    place: Path

    @cached_property
    def _entries(self) -> dict[str, Any]:
        found = StateReader(self.place).read_metadata().state_dict_metadata
        return {name.removeprefix(PREFIX): entry for name, entry in found.items() if name.startswith(PREFIX)}

    @cached_property
    def _start(self) -> ModelFiles:
        return ModelFiles(self.title, self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name on the disk; a tied head that the start does not store is left out."""
        stored = self._start.shapes()
        found = {name: tuple(entry.size) for name, entry in self._entries.items()}
        return {name: shape for name, shape in found.items() if name in stored or name != "lm_head.weight"}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, put together from the shards of all processes."""
        entry = self._entries[name]
        state = {PREFIX + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be here
            dcp.load(state, storage_reader=StateReader(self.place), planner=StatePlanner(), no_dist=True)
        return state[PREFIX + name]

    def dtype(self, name: str) -> torch.dtype:
        """The type that the run's start has the tensor in."""
        return self._start.dtype(name)


def open_source(model: str | os.PathLike[str]) -> Source:
    """The checkpoint that a folder or hub id names.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged.
    """
    place = Path(model).expanduser()
    if not (place / STATE).is_file():
        return ModelFiles("/".join(place.absolute().parts[-2:]), locate(model))
    if (wrong := changed_file(place)) is not None:
        raise ValueError(f"{place} is damaged: {wrong}. Take another checkpoint.")
    settings = place.absolute().parents[1] / "config.yaml"
    if not settings.is_file():
        raise ValueError(f"{place} is a run's checkpoint, but {settings} is missing, which names the model it is of.")
    try:
        found = read_yaml(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{settings} is not valid YAML: {error}") from error
    start = found.get("model") if isinstance(found, dict) else None
    if not isinstance(start, str):
        raise ValueError(f"{settings} does not name the model that the run began with. Restore it.")
    return RunCheckpoint("/".join(place.absolute().parts[-3:]), locate(start), place)
