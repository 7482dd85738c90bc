"""The trained model as a plain Hugging Face folder, which transformers and vLLM open with no extra flag."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.utils.files import write_text

CARD = "README.md"


def export(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    config: TrainConfig,
    order: RowOrder,
    facts: dict[str, Any],
    out: Path,
) -> None:
    """Write weights (in the type of the checkpoint the run started from), config, tokenizer and model card.

    Args:
        model: The trained model.
        weights: Its parameters and buffers, whole, each once (`checkpoint.whole_weights`).
        config: The run.
        order: The rows it was trained on.
        facts: `steps`, `tokens` and `loss` for the model card.
        out: The folder to write; replaced as a whole when it exists.
    """
    dtype = AutoConfig.from_pretrained(config.model).dtype or torch.float32
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: tensor.to("cpu", dtype) for name, tensor in weights.items()}
    attention, model.config._attn_implementation = model.config._attn_implementation, None
    kept, model.config.dtype = model.config.dtype, dtype
    try:
        model.save_pretrained(partial, state_dict=state)
    finally:
        model.config._attn_implementation, model.config.dtype = attention, kept
    AutoTokenizer.from_pretrained(config.model).save_pretrained(partial)
    source = Path(config.model) / CARD
    card = source.read_text(encoding="utf-8") if source.is_file() else f"# {out.parent.name}\n"
    write_text(partial / CARD, card.rstrip() + "\n\n" + _training_section(config, order, facts))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def _training_section(config: TrainConfig, order: RowOrder, facts: dict[str, Any]) -> str:
    """What was done to the model, as a section of its card."""
    loss = "not known" if facts["loss"] is None else f"{facts['loss']:.4f} nats per target"
    optimizer = config.optimizer
    lines = [
        "## Training",
        "",
        f"- {facts['steps']:,} steps of {config.global_batch_size} x {order.length:,} tokens: {facts['tokens']:,} "
        f"tokens, attention {'kept inside documents' if order.mask_documents else 'across documents'}",
        f"- AdamW, learning rate {optimizer.lr:g} ({optimizer.schedule}, {optimizer.warmup_steps} warm-up steps), "
        f"betas {optimizer.betas}, weight decay {optimizer.weight_decay:g}, clipping at {optimizer.clip_norm:g}",
        f"- loss over the last tenth of the steps: {loss}",
    ]
    for source, rows in zip(config.data, order.folders, strict=True):
        sources = rows.manifest.get("sources", {}).values()
        licences = sorted({licence for facts in sources for licence in facts.get("licenses", {})})
        stated = f"; licences: {', '.join(licences)}" if licences else ""
        lines.append(f"- rows: {Path(source.rows).name} ({len(rows):,} rows, weight {source.weight:g}){stated}")
    return "\n".join(lines) + "\n"
