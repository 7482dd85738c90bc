"""A LoRA adapter merged into the model that it was trained on: a plain checkpoint, which every engine reads.

peft adds the product of an adapter's matrices to the weights. It is done here in float32, a layer at a time, and
rounded once to the type of the base model's weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ultralong.checkpoints.config import one_line
from ultralong.checkpoints.files import CARD, locate
from ultralong.checkpoints.merge import REPORT, MergeReport
from ultralong.checkpoints.model_card import merged_card
from ultralong.checkpoints.write import check_free, save_weights, write_checkpoint
from ultralong.training.adapters.config import SETTINGS, is_adapter
from ultralong.utils.extras import require
from ultralong.utils.files import read_json_object, write_json


def merge_adapter(
    models: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], weights: Sequence[float] = ()
) -> MergeReport:
    """Write the model that an adapter was trained on, the adapter added to its weights.

    Args:
        models: The adapter's folder, which names its base; or the base model and then the adapter's folder.
        out: New folder; it must not exist or be empty.
        weights: None can be given.

    Raises:
        ImportError: peft is not installed.
        ValueError: Other models beside the adapter, weights, a base that is not there or does not fit, or a sum that is
            not finite. Nothing is written then.
    """
    *bases, adapter = (Path(model).expanduser() if is_adapter(model) else model for model in models)
    if len(bases) > 1 or weights or not is_adapter(adapter) or any(map(is_adapter, bases)):
        raise ValueError(
            "An adapter is merged into its base alone, without weights: ultralong merge [BASE] ADAPTER --out MERGED."
        )
    check_free(Path(os.path.realpath(Path(out).expanduser())))
    settings = read_json_object(Path(adapter) / SETTINGS)
    base = str(bases[0]) if bases else settings.get("base_model_name_or_path") or ""
    try:
        source = locate(base)
    except ValueError as error:
        raise ValueError(
            f"{adapter} was trained on {base or 'a model without a name'}, which is not there: {one_line(error)} "
            "Name the base before the adapter: ultralong merge BASE ADAPTER --out MERGED."
        ) from error
    model, changed = _merged(source, Path(adapter))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_parameters())}
    report = MergeReport(
        models=(base, str(adapter)),
        weights=(1.0, 1.0),
        out=str(out),
        tensors=changed,
        copied=len(state) - changed,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})),
        adapter=True,
        notes=(f"{Path(adapter).name} was added to {changed} tensors of its base in float32; the others are copied.",),
    )

    def card(folder: Path) -> str:
        write_json(folder / REPORT, report.to_dict())
        text = (source / CARD).read_text(encoding="utf-8") if (source / CARD).is_file() else f"# {Path(out).name}\n"
        return merged_card(text, 2, f"## Merge\n\nThe LoRA adapter {Path(adapter).name}. {report.notes[0]}\n")

    write_checkpoint(out, source, save_weights(model, state), card)
    return report


def _merged(source: Path, adapter: Path) -> tuple[Any, int]:
    """The base model with the adapter in its weights, and how many tensors that changed."""
    peft = require("peft", "lora")
    try:
        base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
        model = peft.PeftModel.from_pretrained(base, adapter)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{adapter} can't be merged into {source}: {one_line(error)}") from error
    changed = 0
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            layer: Any = module.get_base_layer()
            dtype = layer.weight.dtype
            layer.float()
            module.merge(safe_merge=True)
            layer.to(dtype)
            changed += 1
        changed += isinstance(module, peft.utils.ModulesToSaveWrapper)
    plain = model.unload()
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])  # what was trained itself is in the adapter's type
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} is not finite once {adapter} is merged into it.")
    return plain, changed
