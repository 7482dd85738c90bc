"""The adapters that a run trained, in peft's own folder format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ultralong.checkpoints.files import CARD, locate
from ultralong.checkpoints.model_card import read_licence
from ultralong.checkpoints.write import write_folder
from ultralong.training.adapters.lora import NAME
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.model import training_section
from ultralong.utils.extras import require
from ultralong.utils.files import atomic_path, write_text
from ultralong.utils.hub import folder_name

ADAPTER = "adapter"  # the folder in a run's
PREFIX = "base_model.model."  # of a tensor's name in the file: the model is inside peft's


def export_adapter(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    config: TrainConfig,
    order: RowOrder,
    facts: dict[str, Any],
    out: Path,
) -> None:
    """Write what was trained as `peft.PeftModel.save_pretrained` would: adapter_model.safetensors, adapter_config.json.

    `peft.PeftModel.from_pretrained(base, out)` reads it, and so does `ultralong merge out`.

    Args:
        model: The model with its adapters.
        weights: What was trained, whole (`checkpoint.whole_weights`).
        config: The run.
        order: The rows it was trained on.
        facts: `steps`, `tokens` and `loss` for the card.
        out: The folder to write; replaced as a whole when it exists.
    """
    peft = require("peft", "lora")
    # Embeddings that were trained are among what peft calls modules_to_save; its own check asks the hub for the base.
    found = peft.get_peft_model_state_dict(model, weights, adapter_name=NAME, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in found.items()}

    def fill(folder: Path) -> None:
        with atomic_path(folder / "adapter_model.safetensors") as temporary:  # by itself its owner's alone
            save_file(tensors, temporary, metadata={"format": "pt"})
        settings: Any = model.peft_config[NAME]
        settings.inference_mode = True
        settings.save_pretrained(folder)
        settings.inference_mode = False
        write_text(
            folder / CARD, _card(config, settings.base_model_name_or_path, training_section(config, order, facts))
        )

    write_folder(out, fill)


def _card(config: TrainConfig, base: str, section: str) -> str:
    front = {**read_licence(locate(config.model)), "base_model": base, "library_name": "peft", "tags": ["lora"]}
    opening = (
        f"# LoRA adapter of {folder_name(config.model)}\n\n"
        "It holds the trained matrices only; with the model that it was trained on, "
        "`ultralong merge ADAPTER --out MERGED` writes a plain checkpoint.\n"
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{opening}\n{section}"
