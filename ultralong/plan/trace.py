"""One training step followed on fake tensors: what it allocates beyond its states, and how much work it is."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong.plan.stand_ins import NAME, head_loss
from ultralong.plan.tracker import Tracker


@dataclass(frozen=True)
class Trace:
    """What one forward and backward pass of one micro-batch does on one rank.

    Attributes:
        peak: Most bytes alive at once, gradients included, parameters and optimizer states left out.
        multiplied: FLOP of matrix products in the decoder, recomputation included; head and attention left out.
        moved: Bytes read and written by everything else.
        operations: Kernels to start.
    """

    peak: int
    multiplied: int
    moved: int
    operations: int


def trace(config: PreTrainedConfig, tokens: int, *, rows: int = 1, dtype: torch.dtype = torch.bfloat16,
          checkpoint_layers: bool = False, loss_tile: int = 2048, exchanged: bool = False,
          gradients_kept: bool = False) -> Trace:
    """Follow one micro-batch of the trainer on fake tensors.

    Args:
        config: The model.
        tokens: Tokens of a row on one rank.
        rows: Rows at a time.
        dtype: What the forward pass computes in; parameters are float32, as the trainer holds them.
        checkpoint_layers: As in `MemoryConfig`.
        loss_tile: As in `MemoryConfig`.
        exchanged: Attention trades tokens for heads with other ranks.
        gradients_kept: All gradients exist before the pass (a later micro-batch, or the buckets of several ranks).

    Returns:
        Its memory and work.
    """
    plain = _without_lengths(config)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32, attn_implementation=NAME).train()
        if checkpoint_layers:
            recompute_layers(model)
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        with Tracker() as tracker:
            if gradients_kept:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter)
            _step(model, ids, dtype, loss_tile, exchanged)
            return Trace(tracker.peak, tracker.multiplied, tracker.moved, tracker.operations)


def recompute_layers(model: PreTrainedModel) -> None:
    """Have transformers recompute each layer in the backward pass, by the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _step(model: nn.Module, ids: torch.Tensor, dtype: torch.dtype, loss_tile: int, exchanged: bool) -> None:
    narrow = dtype != torch.float32
    with torch.autocast("cpu", dtype=dtype) if narrow else contextlib.nullcontext():
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False,
                                     exchanged=exchanged).last_hidden_state
        total = head_loss(hidden.flatten(0, 1), model.get_output_embeddings().weight, loss_tile, dtype)
    del hidden
    total.backward()


def _without_lengths(config: PreTrainedConfig) -> Any:
    """The config with plain rotary positions: methods that look at values cannot be followed, and cost the same."""
    plain = copy.deepcopy(config)
    parameters = getattr(plain, "rope_parameters", None)
    if isinstance(parameters, dict):
        plain.rope_parameters = {"rope_type": "default", "rope_theta": parameters.get("rope_theta", 10000.0)}
    return plain
