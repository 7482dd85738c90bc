"""The model and the optimizer of a run: loaded, checked against the rows, exported; AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ultralong.attention.register import check_full_attention, check_layers
from ultralong.checkpoints.class_table import class_model, open_model
from ultralong.checkpoints.config import check_whole, one_line, weights_dtype
from ultralong.checkpoints.files import CARD, locate
from ultralong.checkpoints.model_card import trained_card
from ultralong.checkpoints.write import save_weights, write_checkpoint
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.row_checks import anchor_token, check_skipping, longest_position
from ultralong.rope import declared_window
from ultralong.training.adapters.lora import add_adapters
from ultralong.training.batches import RowOrder
from ultralong.training.config import OptimizerConfig, TrainConfig
from ultralong.training.loss import check_head
from ultralong.training.memory.activation_memory import decoder_layers
from ultralong.training.memory.states_8bit import adamw_8bit, check_even_shards


def load_model(config: TrainConfig) -> PreTrainedModel:
    """The model to train, its LoRA adapters included; float32, or the checkpoint's type where it is to be sharded.

    Raises:
        ValueError: There is no loadable causal language model at `config.model`.
    """
    # Sharding makes float32 of a layer at a time: a whole one in each process of a host could fill its memory.
    dtype = torch.float32 if config.parallel.fsdp_shard_degree is None else "auto"
    try:
        check_whole(config.model)
        model = open_model(config.model, _attention(config), dtype)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise ValueError(f"No model could be loaded from {config.model!r}: {one_line(error)}") from error
    return add_adapters(model, config.lora, config.model).train() if config.lora.on else model.train()


def _attention(config: TrainConfig) -> str:
    # The plain fused attention of torch is what torch.compile sees through; it is exact on one process without a mask.
    return "sdpa" if config.compile else "ultralong"


def check_class(place: Path, folders: Sequence[PackedRows], config: TrainConfig) -> None:
    """Refuse a model whose class this run could not train with the weights that are there; none of them is read.

    Args:
        place: Folder of a whole checkpoint.
        folders: The rows.
        config: The run.

    Raises:
        ValueError: A weight is missing or of another shape, or the class has a head, layers or an attention that the
            trainer can't take.
    """
    model = class_model(place, _attention(config))
    check_head(model)
    decoder_layers(model)
    ranks = config.parallel.shared_by
    apart = config.parallel.dynamic or any(rows.mask_documents for rows in folders)
    if ranks > 1 or apart:
        check_layers(model, ranks, apart)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; its states in float32, or in 8 bits by torchao.

    Raises:
        ImportError: 8-bit states are asked for and torchao is not installed.
        ValueError: 8-bit states are asked for and parameters are sharded unevenly.
    """
    parameters = {p: name for name, p in model.named_parameters() if p.requires_grad}
    # The biases of gpt-oss's experts are one tensor of two dimensions.
    decay = {p: p.ndim > 1 and not name.endswith("bias") for p, name in parameters.items()}
    groups = [
        {"params": [p for p in decay if decay[p]], "weight_decay": config.weight_decay},
        {"params": [p for p in decay if not decay[p]], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.state_precision == "8bit":
        check_even_shards([*parameters])
        return adamw_8bit()(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Give a group of parameters its learning rate, which torchao holds in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def export(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    config: TrainConfig,
    order: RowOrder,
    facts: dict[str, Any],
    out: Path,
) -> None:
    """Write the trained model: weights in the type of the checkpoint that the run started from, the rest as there.

    Args:
        model: The trained model.
        weights: Its parameters and buffers, unsharded, each once (`checkpoint.whole_weights`).
        config: The run.
        order: The rows it was trained on.
        facts: `steps`, `tokens` and `loss` for the model card.
        out: The folder to write; replaced as a whole when it exists. A link there is replaced, not what it points to.
    """
    source = locate(config.model)
    dtype = weights_dtype(source) or torch.float32
    state = {name: tensor.to("cpu", dtype) for name, tensor in weights.items()}
    section = training_section(config, order, facts)

    def card(folder: Path) -> str:
        before = source / CARD
        text = before.read_text(encoding="utf-8") if before.is_file() else f"# {out.parent.name}\n"
        return trained_card(text, facts["tokens"], order.length, section)

    attention, model.config._attn_implementation = model.config._attn_implementation, None
    try:
        write_checkpoint(out, source, save_weights(model, state), card, replace=True)
    finally:
        model.config._attn_implementation = attention


def check_anchor(text: Any, folders: Sequence[PackedRows]) -> str:
    """Refuse an anchor that the model or the rows can't have; returns what is shared.

    Args:
        text: The config of the model, or of its text part.
        folders: The rows.

    Raises:
        ValueError: As for `check_full_attention` and `anchor_token`.
    """
    check_full_attention(text, "anchor", "an anchor can't be joined to a window")
    return f"token {anchor_token(folders, text)} at the start of each row is seen by all of its documents"


def check_window(model: PreTrainedConfig, folders: Sequence[PackedRows], config: TrainConfig) -> tuple[str, None]:
    """Refuse rows with positions that the model has not; returns what holds.

    Raises:
        ValueError: A row or document is longer than the window, or positions can't be skipped.
    """
    text, skip_to = model.get_text_config(), config.skip_positions_to
    window = declared_window(text)
    if skip_to is not None:
        check_skipping(folders, skip_to)
        check_full_attention(text)
        if skip_to > window > 0:
            raise ValueError(f"skip_positions_to is {skip_to:,}, the model's window is {window:,}. Extend it first.")
        return f"{window:,} tokens hold every row, with positions skipped up to {skip_to:,}", None
    for rows in folders:
        reach = longest_position(rows) if rows.length > window > 0 else 0
        if reach > window > 0:
            what = "Rows have" if not rows.restart_positions else "Documents in rows have up to"
            raise ValueError(
                f"{what} {reach} tokens in {rows.folder}, the model's window is {window}. Extend the model first "
                f"(ultralong extend {config.model} --to {reach} --out NEW), or pack shorter rows."
            )
    return f"{window:,} tokens hold every row", None


def _long_ce_line(config: TrainConfig) -> list[str]:
    """Which weights the targets had, where they had any."""
    weights = config.long_ce
    if not weights.weight_cap:
        return []
    return [
        f"- LongCE: targets weighted by what more than {weights.short_context:,} tokens of context are worth, at most "
        f"{weights.weight_cap:g}"
    ]


def training_section(config: TrainConfig, order: RowOrder, facts: dict[str, Any]) -> str:
    """What was done to the model, as a section of its card; `facts` as for `export`."""
    lengths = sorted({rows.length for rows in order.folders})
    masked = {rows.mask_documents for rows in order.folders}
    loss = "not known" if facts["loss"] is None else f"{facts['loss']:.4f} nats per target"
    optimizer = config.optimizer
    lines = [
        "## Training",
        "",
        f"- {facts['steps']:,} steps of {config.global_batch_size} x {' or '.join(f'{n:,}' for n in lengths)} tokens: "
        f"{facts['tokens']:,} tokens, attention "
        f"{' or '.join('kept inside documents' if mask else 'across documents' for mask in sorted(masked))}"
        f"{f', positions skipped up to {config.skip_positions_to:,} (PoSE)' if config.skip_positions_to else ''}",
        *(["- one first token of each row is shared by its documents (anchor)"] if config.anchor else []),
        *_long_ce_line(config),
        *([f"- LoRA: {config.lora}, all other weights frozen"] if config.lora.on else []),
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
