"""Tiny models of families with windows, mixtures, sinks and unusual norms, and what transformers computes of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

WINDOW, TOKENS, VOCABULARY = 9, 45, 64  # a row of several windows, a length that divides by nothing
EDGES = (0, 3, 4, 30, TOKENS)
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"head_dim": 8, "sliding_window": WINDOW},
    "Ministral": {"head_dim": 8} | MIXED,
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Gemma3": MIXED
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": LOCAL,
        },
    },
    "Olmo3": MIXED
    | {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 8.0,
                "rope_theta": 5e5,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": LOCAL,
        },
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | MIXED,
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "Glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
}
TILED = tuple(family for family in FAMILIES if family != "Glm4")


def family_config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of a family."""
    name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    return getattr(transformers, name)(**(SIZE | FAMILIES[family] | changes))


def family_model(family: str, attention: str = "ultralong", experts: str = "eager", **changes: Any) -> Any:
    """A tiny random model of a family in float64; grouped products of experts are for narrower types only."""
    torch.manual_seed(0)
    kinds = {"attn_implementation": attention}
    if "num_experts_per_tok" in FAMILIES[family]:
        kinds["experts_implementation"] = experts
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(family_config(family, **changes), **kinds)
    for name, parameter in model.named_parameters():  # what starts as zeros or ones would hide mistakes
        if parameter.ndim == 1 or "bias" in name or name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter, 0.3, 0.5)
    return model.double()


def row() -> tuple[Tensor, Tensor]:
    """Token ids and shifted labels, (1, T) each."""
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=make)
    return ids, torch.where(torch.rand(1, TOKENS, generator=make) < 0.2, -100, ids.roll(-1, 1))


def softmax_of_its_type(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax that stays in float64, where eager attention would round its scores to float32."""
    return torch.softmax(x, dim, dtype if x.dtype != torch.float64 else None)


def expected(family: str, edges: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients of transformers' eager attention, document by document, on one process."""
    model, (ids, labels) = family_model(family, "eager"), row()
    losses = []
    for a, b in pairwise(edges):
        with patch.object(torch.nn.functional, "softmax", softmax_of_its_type):
            logits = model(input_ids=ids[:, a:b], position_ids=torch.arange(a, b)[None], use_cache=False).logits
        losses.append(cross_entropy(logits[0], labels[0, a:b], ignore_index=-100, reduction="sum"))
    total = torch.stack(losses).sum()
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest error of any gradient, relative to its norm."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - grad).norm() / grad.norm()).item() for name, grad in wanted.items())
