"""What the planner needs to know about a model: its config, and numbers that follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from ultralong.attention.register import WITHOUT_STATE
from ultralong.checkpoints.config import load_config
from ultralong.training.throughput import layer_windows, mean_pairs, query_key_pairs, step_flops, used_share

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
_SMOLLM2 = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
# Shapes of models that are planned for before anyone has downloaded them.
MINIATURE = Path(__file__).parents[1] / "miniature" / "model"  # by place: the miniature is made by the trainer
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-70B": _LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.2-1B": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-3B": _LLAMA_3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "HuggingFaceTB/SmolLM2-1.7B": _SMOLLM2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
    "Qwen/Qwen2.5-Coder-1.5B": {  # a Llama's shape, but for the biases of its projections
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
}


@dataclass(frozen=True)
class Shape:
    """A model in numbers.

    Attributes:
        layers: Decoder layers.
        hidden: Size of the hidden states.
        heads: Query heads.
        kv_heads: Kv heads.
        head_dim: Size of a head.
        vocabulary: Rows of the head.
        parameters: All of them, a tied head counted once.
        multiplied: Parameters that each token is multiplied with: all but an input embedding that is only looked up,
            and of experts the share that a token passes.
        windows: Sliding window of each layer, None for full attention.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    multiplied: int
    windows: tuple[int | None, ...] = (None,)

    def model_flops(self, tokens: int) -> float:
        """Causal FLOP of a training step on one row of `tokens`, recomputation not counted.

        The rule is the log's (`ultralong.training.throughput`).
        """
        pairs = mean_pairs(self.windows, tokens, None)
        return step_flops(self.multiplied, self.layers, self.heads * self.head_dim, tokens, pairs)

    def window_share(self, tokens: int, rows: Sequence[Sequence[int]]) -> float:
        """Query-key pairs of a layer in the mean, over what they would be without sliding windows.

        Args:
            tokens: Of a row.
            rows: Document boundaries of some rows; none where documents see each other.
        """
        edges = rows or (None,)
        seen = sum(mean_pairs(self.windows, tokens, row) for row in edges)
        return seen / sum(query_key_pairs(tokens, row) for row in edges)


def model_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a folder, of `miniature`, of a known shape (also with `-Instruct`), or of a hub id.

    Raises:
        ValueError: There is none to be had.
    """
    name = str(MINIATURE if str(model) == "miniature" else model)
    if (Path(name) / "config.json").is_file():
        return load_config(name)
    if (known := KNOWN.get(name.removesuffix("-Instruct"))) is not None:
        return LlamaConfig(**known)
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"{name!r} is neither a model folder, nor a hub id that can be reached, nor a shape that the "
            f"planner knows: {', '.join(KNOWN)}."
        ) from error


def planned_model(model: str, base_model: str | None) -> tuple[PreTrainedConfig, str]:
    """The config of the model to train, and whose it is: the base model's where the checkpoint does not exist yet.

    Extending a window changes neither shapes nor parameters, so a plan of the base model is a plan of the extended one.

    Args:
        model: Folder or hub id of the checkpoint to train.
        base_model: What it is extended from: a folder, a known shape, a hub id, or `miniature`; None if not known.

    Raises:
        ValueError: There is neither to be had.
    """
    if base_model is None or (Path(model) / "config.json").is_file():
        return model_config(model), model
    if base_model == "miniature":
        return model_config(str(resources.files("ultralong.miniature").joinpath("model"))), base_model
    return model_config(base_model), base_model


def shape_of(config: PreTrainedConfig) -> Shape:
    """Count a model from its config, by building it without memory.

    Raises:
        ValueError: It is not a decoder with attention heads.
    """
    text = config.get_text_config()
    if getattr(text, "num_attention_heads", None) is None:
        raise ValueError(f"{type(config).__name__} has no attention heads; the planner is for transformer decoders.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = used_share(model)
    used = sum(parameter.numel() * share.get(id(parameter), 1) for parameter in model.parameters())
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=head.shape[0],
        parameters=parameters,
        multiplied=round(used if head is embedding else used - embedding.numel()),
        windows=layer_windows(text),
    )


def check_countable(config: PreTrainedConfig) -> None:
    """Refuse a model whose work and memory the planner would count wrong.

    Raises:
        ValueError: A layer is not of attention, or has experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - WITHOUT_STATE
    experts = next((name for name, _ in model.named_modules() if name.endswith(".experts")), None)
    found = f"experts ({experts}), of which a token passes a few" if experts else ""
    if kinds or getattr(model, "_is_stateful", False):
        found = f"layers of {', '.join(sorted(kinds)) or 'a state along the row'}"
    if found:
        raise ValueError(
            f"The planner counts dense layers of attention, and {type(model).__name__} has {found}. Train a few steps "
            "on the machine instead: the log of a run has their seconds."
        )
