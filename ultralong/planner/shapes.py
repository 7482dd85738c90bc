"""What the planner needs to know about a model: its config, and numbers that follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ultralong.attention.register import WITHOUT_STATE
from ultralong.checkpoints.config import head_counts, head_size, load_config
from ultralong.planner.models.known import KNOWN
from ultralong.training.throughput import layer_windows, mean_pairs, query_key_pairs, step_flops, used_share
from ultralong.utils.hub import local_folder


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

    @property
    def token_work(self) -> float:
        """What a token costs beside attention, in query-key pairs, as in `ultralong.training.throughput`."""
        return self.multiplied / (2 * self.layers * self.heads * self.head_dim)

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
    name = str(local_folder(model))
    if (Path(name) / "config.json").is_file():
        return load_config(name)
    if (known := KNOWN.get(name.removesuffix("-Instruct"))) is not None:
        return AutoConfig.for_model(**({"model_type": "llama"} | known))
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
    heads, kv_heads = head_counts(text)
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_size(text),
        vocabulary=head.shape[0],
        parameters=parameters,
        multiplied=round(used if head is embedding else used - embedding.numel()),
        windows=layer_windows(text),
    )


def check_countable(config: PreTrainedConfig) -> None:
    """Refuse a model whose work and memory the planner would count wrong.

    Raises:
        ValueError: A layer is not of attention.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - WITHOUT_STATE
    if kinds or getattr(model, "_is_stateful", False):
        found = f"layers of {', '.join(sorted(kinds)) or 'a state along the row'}"
        raise ValueError(
            f"The planner counts layers of attention, and {type(model).__name__} has {found}. Train a few steps "
            "on the machine instead: the log of a run has their seconds."
        )
