"""One training step followed on fake tensors: what it allocates beyond its states, and how much work it is."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong.planner.fake_attention import NAME, Context, head_loss
from ultralong.planner.tracker import Tracker
from ultralong.training.config import MemoryConfig
from ultralong.training.memory import ActivationMemory

FOLLOWED = (2, 3)  # layers that stand for a deep model's


@dataclass(frozen=True)
class Trace:
    """What one forward and backward pass of one micro-batch does on one rank.

    Attributes:
        peak: Most bytes alive at once, gradients included, parameters and optimizer states left out.
        loss_peak: Most bytes alive before the backward pass began.
        backward_peak: And after.
        multiplied: FLOP of matrix products in the decoder, recomputation included; head and attention left out.
        moved: Bytes read and written by everything else.
        operations: Kernels to start.
    """

    peak: int
    loss_peak: int
    backward_peak: int
    multiplied: int
    moved: int
    operations: int

    def towards(self, other: Trace, part: float) -> Trace:
        """What lies so far on the straight line from this one (0) through another (1)."""
        return Trace(*(round(a + part * (b - a)) for a, b in zip(astuple(self), astuple(other), strict=True)))


def trace(
    config: PreTrainedConfig,
    tokens: int,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    activation_checkpointing: bool = False,
    loss_tile: int = 2048,
    layer_tile: int = 0,
    exchanged: int = 0,
    ranks: int = 1,
    gathered: bool = False,
    gradients_kept: bool = False,
    sharded: bool = False,
) -> Trace:
    """Follow one micro-batch of the trainer on fake tensors.

    Args:
        config: The model.
        tokens: Tokens of a row on one rank.
        rows: Rows at a time.
        dtype: What the forward pass computes in; parameters are float32, as the trainer holds them.
        activation_checkpointing: As in `MemoryConfig`.
        loss_tile: As in `MemoryConfig`.
        layer_tile: As in `MemoryConfig`.
        exchanged: Attention trades tokens for heads with other ranks, in this many stages; 0 where it does not.
        ranks: That share the row.
        gathered: They gather keys, in at least as many rounds as `exchanged`, instead of trading.
        gradients_kept: All gradients exist before the pass (a later micro-batch, or the buckets of several ranks).
        sharded: Parameters are shared out (FSDP2): computed with in `dtype`, their gradients given up layer by layer.

    Returns:
        Its memory and work.
    """
    options = (
        rows,
        dtype,
        activation_checkpointing,
        loss_tile,
        layer_tile,
        exchanged,
        ranks,
        gathered,
        gradients_kept,
        sharded,
    )
    layers = config.get_text_config().num_hidden_layers
    if not layer_tile or layers <= FOLLOWED[1]:
        return _traced(config, tokens, *options)
    # Tiles are many operations to follow, and layers are alike: two depths give the line through all.
    few, more = (_traced(_with_layers(config, count), tokens, *options) for count in FOLLOWED)
    return few.towards(more, (layers - FOLLOWED[0]) / (FOLLOWED[1] - FOLLOWED[0]))


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The config with its first layers only."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    text.num_hidden_layers = count
    return shallow


def _traced(
    config: PreTrainedConfig,
    tokens: int,
    rows: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    loss_tile: int,
    layer_tile: int,
    exchanged: int,
    ranks: int,
    gathered: bool,
    gradients_kept: bool,
    sharded: bool,
) -> Trace:
    plain = _without_lengths(config)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        kept = dtype if sharded else torch.float32
        model = AutoModelForCausalLM.from_config(plain, dtype=kept, attn_implementation=NAME).train()
        if layer_tile:
            ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=layer_tile))
        elif activation_checkpointing:
            recompute_layers(model)
        if sharded:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_give_up)
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        with Tracker() as tracker:
            if gradients_kept and not sharded:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter)
            total = _loss(model, ids, dtype, loss_tile, Context(exchanged, ranks, gathered), sharded)
            before, tracker.peak = tracker.peak, tracker.live
            total.backward()
            return Trace(
                max(before, tracker.peak), before, tracker.peak, tracker.multiplied, tracker.moved, tracker.operations
            )


def recompute_layers(model: PreTrainedModel) -> None:
    """Have transformers recompute each layer in the backward pass, by the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _give_up(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _loss(
    model: nn.Module, ids: torch.Tensor, dtype: torch.dtype, loss_tile: int, context: Context, sharded: bool = False
) -> torch.Tensor:
    narrow = dtype != torch.float32 and not sharded
    with torch.autocast("cpu", dtype=dtype) if narrow else contextlib.nullcontext():
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        hidden = model.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, attention_context=context
        ).last_hidden_state
        return head_loss(hidden.flatten(0, 1), model.get_output_embeddings().weight, loss_tile, dtype)


def _without_lengths(config: PreTrainedConfig) -> Any:
    """The config with plain rotary positions: methods that look at values cannot be followed, and cost the same."""
    plain = copy.deepcopy(config)
    parameters = getattr(plain, "rope_parameters", None)
    if isinstance(parameters, dict):
        plain.rope_parameters = {"rope_type": "default", "rope_theta": parameters.get("rope_theta", 10000.0)}
    return plain
