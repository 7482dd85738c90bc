"""Load checkpoints for inference."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong import attention
from ultralong.checkpoints.class_table import open_model
from ultralong.checkpoints.config import one_line
from ultralong.checkpoints.files import weight_files
from ultralong.utils.hub import load_tokenizer


def find_device(name: str = "auto") -> str:
    """A device of this machine by torch's name for it; `auto` is the GPU where there is one.

    Raises:
        ValueError: It is no name of a device, or there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError
        torch.empty(1, device=device).to("cpu")  # what this build of torch lacks, and `meta`, which holds nothing
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"There is no {name!r} on this machine: use --device cpu.") from None
    return name


def load_model(
    model: str | os.PathLike[str], device: str = "auto", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model with this library's attention, in evaluation mode.

    Args:
        model: Folder or hub id.
        device: `auto`, or any of torch's.
        dtype: Type of the parameters; None is float32 on a CPU and the checkpoint's own elsewhere.

    Raises:
        ValueError: There is no such checkpoint, or no such device.
    """
    device = find_device(device)
    chosen = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        if Path(model).is_dir():
            weight_files(Path(model))
        loaded = open_model(model, attention.NAME, chosen)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise ValueError(f"{model} cannot be opened as a checkpoint: {one_line(error)}") from error
    placed: PreTrainedModel = loaded.to(device)  # type: ignore[arg-type]  # wrapped by transformers without its types
    return placed.eval()


def load_model_and_tokenizer(
    model: str | os.PathLike[str], device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint ready to be measured: float32 on a CPU, its own type on a GPU, attention without masks.

    Args:
        model: Folder or hub id.
        device: `auto`, or any of torch's.

    Raises:
        ValueError: There is no such checkpoint, or no such device.
    """
    return load_model(model, device), load_tokenizer(model)
