"""The models that are traced: of a few layers, of fake tensors, with adapters where a run has them."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong.attention import NAME
from ultralong.planner.traces.shape_tensors import real_tensors
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import add_adapters


def config_of(model: str) -> PreTrainedConfig:
    """A config from its JSON."""
    values = json.loads(model)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def fake_model(config: PreTrainedConfig, dtype: torch.dtype, lora: LoRAConfig) -> PreTrainedModel:
    """A model of fake tensors in training mode; called inside a `ShapeMode`."""
    return _adapted(config, dtype, lora) if lora.on else _made(config, dtype)


def _made(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME).train()


def _adapted(config: PreTrainedConfig, dtype: torch.dtype, lora: LoRAConfig) -> PreTrainedModel:
    """Peft converts the type of what it puts in, which fake tensors can't: it does that on tensors without memory."""
    with real_tensors(), torch.device("meta"):
        model = add_adapters(_made(config, dtype), lora).train()
    new: dict[int, Tensor] = {}  # a tied head stays tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in new:
                    # peft's matrices are float32; FSDP2 gathers them in what is computed in, as all others.
                    fake = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                    new[id(old)] = nn.Parameter(fake, old.requires_grad) if isinstance(old, nn.Parameter) else fake
                tensors[name] = None if old is None else new[id(old)]
    return model


def plain(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config with its first layers, and plain rotary positions.

    Methods that look at values can't be traced, and cost the same.
    """
    plain = copy.deepcopy(config)
    text = plain.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    if isinstance(getattr(text, "rope_parameters", None), dict):
        text.rope_parameters = _plain_rope(text.rope_parameters)
    return plain


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE of the same base without a scaling, for each kind of layer where they have their own."""
    kinds: dict[str, Any] = {kind: _plain_rope(own) for kind, own in parameters.items() if isinstance(own, dict)}
    return kinds or {"rope_type": "default", "rope_theta": parameters.get("rope_theta", 10000.0)}
