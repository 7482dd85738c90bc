"""One configuration with everything that its estimates depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from ultralong.attention.ulysses import head_split
from ultralong.planner.machine import Machine
from ultralong.planner.shapes import Shape
from ultralong.planner.trace import Trace, trace
from ultralong.training.config import TrainConfig, layers_meant

FLOAT = 4
_followed: dict[Any, Trace] = {}


@dataclass(frozen=True)
class Job:
    """A configuration with everything that the estimates depend on.

    Attributes:
        config: The run.
        model: The model's config.
        shape: The model in numbers.
        machine: The GPU.
        tokens: Tokens of a row.
        gpus: Processes of the run.
        followed: Its step, if that is known; it is followed on fake tensors otherwise.
    """

    config: TrainConfig
    model: PreTrainedConfig
    shape: Shape
    machine: Machine
    tokens: int
    gpus: int
    followed: Trace | None = None

    @property
    def sequence(self) -> int:
        """GPUs that share a row."""
        return self.config.parallel.context_parallel_size

    @property
    def share(self) -> int:
        """Tokens of a row on one GPU."""
        return -(-self.tokens // self.sequence)

    @property
    def passes(self) -> int:
        """Micro-batches of a step on one GPU."""
        groups = self.gpus // self.sequence
        return self.config.global_batch_size // (groups * self.config.micro_batch_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return torch.float32 if self.config.dtype == "float32" else torch.bfloat16

    @cached_property
    def trace(self) -> Trace:
        """One micro-batch followed on fake tensors; some seconds, once for plans that differ in what waits where."""
        if self.followed is not None:
            return self.followed
        memory = self.config.memory
        options = {
            "rows": self.config.micro_batch_size,
            "dtype": self.dtype,
            "activation_checkpointing": memory.activation_checkpointing,
            "loss_tile": memory.loss_tile,
            "layer_tile": memory.layer_tile,
            "exchanged": (self.config.parallel.head_chunks or 1) if self.sequence > 1 else 0,
            "ranks": self.sequence,
            "gathered": self.gathered,
            "gradients_kept": self.gpus > 1 or self.passes > 1,
            "sharded": self.shard is not None,
        }
        key = (self.model.to_json_string(), self.share, *options.items())
        if key not in _followed:
            _followed[key] = trace(self.model, self.share, **options)
        return _followed[key]

    @cached_property
    def gathered(self) -> bool:
        """Whether GPUs that share a row gather its keys, asked to or because the heads don't split over them."""
        scheme = self.config.parallel.scheme
        if self.sequence > 1 and scheme == "auto":
            try:
                head_split(self.shape.heads, self.shape.kv_heads, self.sequence)
            except ValueError:
                return True
        return self.sequence > 1 and scheme == "gathered"

    @property
    def shard(self) -> int | None:
        """GPUs that share the parameters; None where each has them all."""
        return self.config.parallel.fsdp_shard_degree

    @property
    def stream_bytes(self) -> int:
        """Bytes of an element of the hidden states between layers: autocast leaves them in float32."""
        return FLOAT if self.shard is None or self.dtype == torch.float32 else 2

    @property
    def input_bytes(self) -> float:
        """Bytes of one layer's input on one GPU."""
        return self.share * self.config.micro_batch_size * self.shape.hidden * self.stream_bytes

    @property
    def result_bytes(self) -> float:
        """Bytes of one layer's attention result on one GPU; the log-sum-exp beside it is float32."""
        return self.share * self.config.micro_batch_size * self.shape.heads * self.shape.head_dim * self.dtype.itemsize

    @property
    def statistic_bytes(self) -> float:
        """Bytes of one layer's log-sum-exp on one GPU."""
        return self.share * self.config.micro_batch_size * self.shape.heads * FLOAT

    @property
    def inputs(self) -> int:
        """Layers whose input is kept; the others' are made again."""
        return -(-self.shape.layers // self.config.memory.checkpoint_every)

    @cached_property
    def placed(self) -> tuple[int, int, int]:
        """Layers whose attention result is kept, whose attention result is moved, and whose kept input is moved."""
        memory, layers = self.config.memory, self.shape.layers
        if not memory.activation_checkpointing:
            return 0, 0, 0
        kept = layers_meant(memory.attention_outputs_on_gpu, layers)
        moved = min(layers_meant(memory.attention_outputs_offloaded, layers), layers - kept)
        return kept, moved, layers_meant(memory.layer_inputs_offloaded, self.inputs)


def outside_parameters(job: Job) -> int:
    """Parameters outside of the layers: embedding and head, one if they are tied."""
    tied = job.shape.multiplied == job.shape.parameters
    return (1 if tied else 2) * job.shape.vocabulary * job.shape.hidden


def layer_parameters(job: Job) -> float:
    """Parameters of one layer."""
    return (job.shape.parameters - outside_parameters(job)) / job.shape.layers
