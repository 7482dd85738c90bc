"""Throughput of a step: tokens per second, model FLOP utilisation (MFU), and the memory it took.

The rule, here and in every table of this project: causal FLOP, recomputation not counted. Six for each token and
parameter that it is multiplied with (four for a frozen one, which has no gradient of its own), and for attention 2 H D
for every pair of a query and a key that it sees forward (half of the full square for a whole row, by document under a
mask) and twice that backward, in every layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultralong.checkpoints.config import head_size
from ultralong.utils.units import GIB

# Dense bfloat16 FLOP/s of the vendors' datasheets, by a part of the device's name; the first that fits counts.
DATASHEET = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


FROZEN_SHARE = 2 / 3  # four of six


def step_flops(matmul_parameters: float, layers: int, attention_size: int, tokens: float, pairs: float) -> float:
    """Causal FLOP of a training step (see the module's rule).

    Args:
        matmul_parameters: Parameters that each token is multiplied with (without the embedding), frozen ones counted
            as `FROZEN_SHARE` of one.
        layers: Decoder layers.
        attention_size: Query heads times head size, H D.
        tokens: Tokens of the step.
        pairs: Query-key pairs of the step, T^2 / 2 for a whole row of T.
    """
    return 6.0 * matmul_parameters * tokens + 12.0 * layers * attention_size * pairs


def query_key_pairs(tokens: int, boundaries: Sequence[int] | Tensor | None, window: int | None = None) -> float:
    """Pairs of a query and a key that it sees in a row, or in several laid end to end with these boundaries.

    Args:
        tokens: Of the row.
        boundaries: Of its documents, or None for one.
        window: Sliding window of the layer: a query sees that many keys at most.
    """
    edges = boundaries.tolist() if isinstance(boundaries, Tensor) else boundaries or (0, tokens)
    lengths = [b - a for a, b in pairwise(edges)]
    hidden = 0 if window is None else sum(max(0, length - window) ** 2 for length in lengths)
    return (sum(length**2 for length in lengths) - hidden) / 2


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer of a model, None for full attention, from its (text) config."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[: config.num_hidden_layers])


def mean_pairs(windows: Sequence[int | None], tokens: int, boundaries: Sequence[int] | Tensor | None) -> float:
    """`query_key_pairs` of a layer in the mean, over layers with these windows."""
    counts = Counter(windows)
    return sum(n * query_key_pairs(tokens, boundaries, window) for window, n in counts.items()) / len(windows)


def used_share(model: nn.Module) -> dict[int, float]:
    """By `id` of each parameter of experts, which share of them a token is multiplied with; 1 for all others."""
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    return {id(x): min(1.0, chosen / x.shape[0]) for module in experts for x in module.parameters() if chosen}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 rate in FLOP/s; None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


@dataclass(frozen=True)
class Throughput:
    """Computes the throughput of a run's steps.

    Attributes:
        matmul_parameters: As in `step_flops`.
        layers: As in `step_flops`.
        attention_size: As in `step_flops`.
        device: This process's.
        processes: Of the run.
        windows: Sliding window of each layer, None for full attention.
    """

    matmul_parameters: float
    layers: int
    attention_size: int
    device: torch.device
    processes: int
    windows: tuple[int | None, ...] = (None,)

    @classmethod
    def from_model(cls, model: PreTrainedModel, device: torch.device, processes: int) -> Throughput:
        """That of a causal language model, before its parameters are sharded."""
        text = model.config.get_text_config()
        embedding: Any = model.get_input_embeddings()
        tied = model.get_output_embeddings().weight is embedding.weight
        looked_up = set() if tied else {id(parameter) for parameter in embedding.parameters()}
        used = [parameter for parameter in model.parameters() if id(parameter) not in looked_up]
        share = used_share(model)
        return cls(
            sum(x.numel() * share.get(id(x), 1) * (1 if x.requires_grad else FROZEN_SHARE) for x in used),
            text.num_hidden_layers,
            text.num_attention_heads * head_size(text),
            device,
            processes,
            layer_windows(text),
        )

    def pairs(self, tokens: int, boundaries: Sequence[int] | Tensor | None) -> float:
        """`query_key_pairs` of a row in a layer, in the mean over the model's layers and their windows."""
        return mean_pairs(self.windows, tokens, boundaries)

    @property
    def token_work(self) -> float:
        """What a token costs beside attention, in query-key pairs (see `step_flops`)."""
        return self.matmul_parameters / (2 * self.layers * self.attention_size)

    def metrics(self, seconds: float, tokens: int, seen: float) -> dict[str, float]:
        """Metrics of a step for the log, over all processes; resets the peak of memory.

        Args:
            seconds: Of the step.
            tokens: Of the step.
            seen: Query-key pairs of the step.

        Returns:
            `tokens_per_second`, `tokens_per_second_per_gpu`, `mfu_causal` where the device's rate is known, and
            `peak_gpu_gib` of this process on a GPU.
        """
        rate = tokens / seconds
        found = {"tokens_per_second": round(rate, 1), "tokens_per_second_per_gpu": round(rate / self.processes, 1)}
        if peak := peak_flops(self.device):
            flops = step_flops(self.matmul_parameters, self.layers, self.attention_size, tokens, seen)
            found["mfu_causal"] = round(flops / seconds / self.processes / peak, 4)
        if self.device.type == "cuda":
            found["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)
            torch.cuda.reset_peak_memory_stats(self.device)
        return found
