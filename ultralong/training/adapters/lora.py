"""Adapters of the `peft` library in a Hugging Face causal language model: put in, checked, counted.

peft is asked to change the model in place, so what is trained is the same class of model, with `lora.Linear` where
there was `nn.Linear`: the loss, the sharding and the decoder layers with a custom backward pass find what they look
for. Embeddings and norms are trained as copies beside the frozen ones (peft's `modules_to_save`), so that an adapter's
folder holds everything that was trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong.training.adapters.config import ALL_LINEAR, LoRAConfig
from ultralong.training.adapters.four_bits import check_shapes, mark, marked
from ultralong.training.config import TrainConfig
from ultralong.utils.extras import require

NAME = "default"  # of an adapter inside the model, as peft calls the first one


@dataclass(frozen=True)
class TrainedParameters:
    """Parameters of a model with adapters, in numbers.

    Attributes:
        trained: All that are trained.
        trained_in_layers: Those of them that are in the decoder layers.
        frozen: All others.
        in_four_bits: Those of them whose weights are held in 4 bits.
        largest_in_four_bits: Those in the largest matrix.
    """

    trained: int
    trained_in_layers: int
    frozen: int
    in_four_bits: int = 0
    largest_in_four_bits: int = 0


def add_adapters(model: PreTrainedModel, config: LoRAConfig, base: str | os.PathLike[str] = "") -> PreTrainedModel:
    """Freeze a model's weights and put LoRA adapters beside them, in place.

    Args:
        model: The causal language model.
        config: Which adapters.
        base: Folder or hub id of the model, for the adapters' own config.

    Returns:
        The same model.

    Raises:
        ImportError: peft is not installed.
        ValueError: The model has no module of a name in `targets`, what is asked for can't be trained, or its layers
            can't be held in 4 bits.
    """
    peft = require("peft", "lora")
    _check_targets(model, config)
    place = os.path.abspath(base) if base and Path(base).is_dir() else str(base)
    made = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=ALL_LINEAR if config.targets == (ALL_LINEAR,) else list(config.targets),
        modules_to_save=list(trained_whole(model, config)) or None,
        base_model_name_or_path=place or None,
    )
    adapted: PreTrainedModel = peft.inject_adapter_in_model(made, model, adapter_name=NAME)
    if config.base == "nf4":
        mark(adapted)
    return adapted


def trained_whole(model: PreTrainedModel, config: LoRAConfig) -> list[str]:
    """Names of the modules that are trained themselves: embedding and norms, where that is asked for.

    Raises:
        ValueError: The embedding is also the head.
    """
    names = set()
    if config.train_embeddings:
        embedding: Any = model.get_input_embeddings()
        if model.get_output_embeddings().weight is embedding.weight:
            raise ValueError(
                "lora.train_embeddings is for models with a head of their own; this one's head is its embedding "
                "(tie_word_embeddings), and a trained copy would part them. Set lora.train_embeddings to false."
            )
        names |= {name.rpartition(".")[2] for name, module in model.named_modules() if module is embedding}
    if config.train_norms:
        names |= {name.rpartition(".")[2] for name, module in model.named_modules() if _is_norm(module)}
    return sorted(names)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def _check_targets(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Refuse a target that no linear module has, and the embedding and the head, whose weights are read directly."""
    if config.targets == (ALL_LINEAR,):
        return
    ends: set[Any] = {model.get_input_embeddings(), model.get_output_embeddings()}
    linear = {
        name.rpartition(".")[2] for name, x in model.named_modules() if isinstance(x, nn.Linear) and x not in ends
    }
    for target in config.targets:
        if target not in linear:
            raise ValueError(
                f"lora.targets: {target!r} is no linear module inside the layers of {type(model).__name__}. Known: "
                f"{', '.join(sorted(linear))}, or {ALL_LINEAR} for all of them."
            )


def check_lora(config: PreTrainedConfig, run: TrainConfig, installed: bool) -> str:
    """Refuse adapters that a model can't have, by its config alone; returns what will be trained.

    Args:
        config: The model's.
        run: The run's.
        installed: Whether peft has to be there.

    Raises:
        ImportError: peft is not installed.
        ValueError: As for `add_adapters`; a quantised checkpoint; dropout with `memory.layer_tile`; weights in 4 bits
            that are not sharded, or can't be.
    """
    lora = run.lora
    if (found := getattr(config, "quantization_config", None)) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise ValueError(
            f"the checkpoint is quantised ({method or 'quantization_config'}), in a format that FSDP2 can't shard: "
            "start from the unquantised checkpoint. With lora.base: nf4 (QLoRA) a run holds its frozen matrices in 4 "
            "bits."
        )
    if lora.dropout and run.memory.layer_tile:
        raise ValueError(
            f"memory.layer_tile computes layers again tile by tile, where lora.dropout ({lora.dropout:g}) would draw "
            "other numbers: set lora.dropout to 0, or memory.layer_tile to 0."
        )
    if lora.base == "nf4" and run.parallel.fsdp_shard_degree is None:
        raise ValueError(
            "lora.base: nf4 holds weights as FSDP2 shards them: set parallel.fsdp_shard_degree (1 on one GPU)."
        )
    if not installed and not _is_installed():
        return f"{lora}; peft is not installed here, so its parameters are not counted"
    check_shapes(_without_memory(config, lora), run.parallel.fsdp_shard_degree or 1)
    counts = count_trained(config, lora)
    share = counts.trained / (counts.trained + counts.frozen)
    return f"{lora}: {counts.trained:,} parameters are trained ({share:.2%})"


def _is_installed() -> bool:
    try:
        require("peft", "lora")
    except ImportError:
        return False
    return True


def count_trained(config: PreTrainedConfig, lora: LoRAConfig) -> TrainedParameters:
    """Count what is trained and what is frozen, by building the model without memory.

    A trained embedding or norm counts as trained, and its frozen original as frozen.
    """
    model = _without_memory(config, lora)
    trained = dict(trained_parameters(model))
    inside = {id(p) for layer in model.get_decoder().layers for p in layer.parameters()}
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained.values())
    held = [module.weight.numel() for _, module in marked(model)]
    return TrainedParameters(
        count,
        sum(p.numel() for p in trained.values() if id(p) in inside),
        total - count,
        sum(held),
        max(held, default=0),
    )


def _without_memory(config: PreTrainedConfig, lora: LoRAConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return add_adapters(AutoModelForCausalLM.from_config(config), lora)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def without_frozen(states: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A model's state dict, as torch's distributed checkpoint names it, without the frozen parameters."""
    every = model.named_parameters(remove_duplicate=False)
    frozen = {name.removeprefix("module.") for name, parameter in every if not parameter.requires_grad}
    return {name: value for name, value in states.items() if name not in frozen}


def has_frozen(model: nn.Module) -> bool:
    """Whether some parameters of a model are frozen."""
    return any(not parameter.requires_grad for parameter in model.parameters())
