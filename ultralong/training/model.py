"""The model and the optimizer of a run, as the loop wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralong.training.batches import RowOrder
from ultralong.training.config import OptimizerConfig, TrainConfig
from ultralong.training.optimizer_8bit import check_shares, eight_bit_adamw


def load_model(config: TrainConfig) -> PreTrainedModel:
    """The model to train: our attention, caching off; float32, or the checkpoint's type where it is to be sharded.

    Raises:
        ValueError: There is no loadable causal language model at `config.model`.
    """
    # The plain fused attention of torch is what torch.compile sees through; it is exact on one process without a mask.
    attention = "sdpa" if config.compile else "ultralong"
    # Sharding makes float32 of a layer at a time: a whole one in each process of a host could fill its memory.
    dtype = torch.float32 if config.parallel.fsdp_shard_degree is None else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, attn_implementation=attention)
    except OSError as error:
        raise ValueError(f"No model could be loaded from {config.model!r}: {str(error).splitlines()[0]}") from error
    return model.train()


def check_model(model: PreTrainedModel, order: RowOrder) -> None:
    """Refuse rows that the model was not made for.

    Raises:
        ValueError: The rows' vocabulary is larger than the model's, or they are longer than its window.
    """
    size = model.get_input_embeddings().weight.shape[0]
    for rows in order.folders:
        vocabulary = rows.manifest["tokenizer"]["vocabulary"]
        if vocabulary > size:
            raise ValueError(
                f"{rows.folder} was tokenised with a vocabulary of {vocabulary} tokens, the model has {size}. Pack the "
                "documents with the model's own tokenizer."
            )
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and order.length > window and not order.folders[0].restart_positions:
        raise ValueError(
            f"Rows have {order.length} tokens, the model's window is {window}. Extend the model first "
            f"(ultralong extend ... --to {order.length}), or pack shorter rows."
        )


def head_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Query heads and kv heads of a layer."""
    text = model.config.get_text_config()
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; its states in float32, or in 8 bits by torchao.

    Raises:
        ImportError: 8-bit states are asked for and torchao is not installed.
        ValueError: 8-bit states are asked for and parameters are shared out unevenly.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.state_precision == "8bit":
        check_shares(parameters)
        return eight_bit_adamw()(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Give a group of parameters its learning rate, which torchao holds in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
