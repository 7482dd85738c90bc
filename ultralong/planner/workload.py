"""One configuration with everything that its estimates depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from transformers import PreTrainedConfig

from ultralong.planner.machine import Machine
from ultralong.planner.rows import PlannedPacks, at_length
from ultralong.planner.shapes import Shape
from ultralong.planner.traces.attention import AttentionTrace, AttentionWorkload, between
from ultralong.planner.traces.child import attention_trace
from ultralong.planner.traces.kernel import planned_kernel
from ultralong.planner.traces.layers import LayerTrace, StepSettings, trace_layers
from ultralong.planner.trained import PlannedParameters, planned_parameters
from ultralong.training.config import MemoryConfig, TrainConfig
from ultralong.training.memory.activation_memory import layers_meant
from ultralong.training.throughput import query_key_pairs

FLOAT = 4
TRACED_SETTINGS = ("activation_checkpointing", "loss_tile", "layer_tile")  # the only ones of memory that a trace sees


@dataclass(frozen=True)
class StepTrace:
    """What one micro-batch does on one GPU: its layers, and one layer's attention.

    Attributes:
        layers: All layers and the loss, attention itself left out.
        attention: One layer's attention, of the row with the most to gather.
    """

    layers: LayerTrace
    attention: AttentionTrace

    @property
    def before_backward(self) -> float:
        """Most bytes before the backward pass begins."""
        return self.layers.before_backward(self.attention.forward.peak)

    def in_backward(self, later: float | None = None) -> float:
        """Most bytes in the backward pass; `later` as in `LayerTrace.in_backward`."""
        return self.layers.in_backward(self.attention.forward.peak, self.attention.backward.peak, later)

    def peak(self, later: float | None = None) -> float:
        """Most bytes in both passes; `later` as in `LayerTrace.in_backward`."""
        return max(self.before_backward, self.in_backward(later))

    def towards(self, other: StepTrace, part: float) -> StepTrace:
        """What lies so far on the straight line from this one (0) through another (1)."""
        return StepTrace(self.layers.towards(other.layers, part), between(self.attention, other.attention, part))


@dataclass(frozen=True)
class Workload:
    """A configuration with everything that the estimates depend on.

    Attributes:
        config: The run.
        model: The model's config.
        shape: The model in numbers.
        machine: The GPU.
        tokens: Tokens of a row.
        gpus: Processes of the run.
        documents: Boundaries of some of its rows where documents don't see each other; None where they do.
        packs: What is known of its packs where rows are packed by the step; `tokens` and `documents` are then a pack's.
        traced: Its step, if that is known; it is traced on fake tensors otherwise.
    """

    config: TrainConfig
    model: PreTrainedConfig
    shape: Shape
    machine: Machine
    tokens: int
    gpus: int
    documents: tuple[tuple[int, ...], ...] | None = None
    packs: PlannedPacks | None = None
    traced: StepTrace | None = None

    @property
    def context_parallel_size(self) -> int:
        """GPUs that share a row."""
        return self.config.parallel.shared_by

    @property
    def share(self) -> int:
        """Tokens of a row on one GPU."""
        return -(-self.tokens // self.context_parallel_size)

    @property
    def step_tokens(self) -> float:
        """Tokens of a step over all GPUs."""
        return self.config.global_batch_size * self.tokens if self.packs is None else self.packs.tokens

    @property
    def passes(self) -> float:
        """Micro-batches of a step on one GPU; of packs as many full ones as hold its tokens."""
        groups = self.gpus // self.context_parallel_size
        if self.config.parallel.dynamic:
            return self.step_tokens / (groups * self.tokens)
        return self.config.global_batch_size // (groups * self.config.micro_batch_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return torch.float32 if self.config.dtype == "float32" else torch.bfloat16

    @cached_property
    def trace(self) -> StepTrace:
        """One micro-batch traced on fake tensors; some seconds, once for plans that differ in what is stored where."""
        if self.traced is not None:
            return self.traced
        memory, micro = self.config.memory, self.config.micro_batch_size
        masked = self.documents is not None  # then the rows of a micro-batch lie end to end
        settings = StepSettings(
            rows=1 if masked else micro,
            dtype=self.dtype,
            activation_checkpointing=memory.activation_checkpointing,
            loss_tile=memory.loss_tile,
            layer_tile=memory.layer_tile,
            gradients_kept=self.gpus > 1 or self.passes > 1,
            sharded=self.shard is not None,
            lora=self.config.lora,
        )
        layers = trace_layers(self.model, self.share * (micro if masked else 1), settings)
        return StepTrace(layers, self._attention(self._heaviest))

    @cached_property
    def usual_attention(self) -> AttentionTrace:
        """One layer's attention of the row whose work is nearest to the mean: the one that seconds are taken from."""
        return self.trace.attention if self.documents is None else self._attention(self._usual)

    @property
    def work_over_usual(self) -> float:
        """Query-key pairs of a row in the mean, over those of the row of `usual_attention`."""
        if self.documents is None:
            return 1.0
        return self.keys_seen * self.tokens / query_key_pairs(self.tokens, self._usual)

    @cached_property
    def keys_seen(self) -> float:
        """Keys that a query sees in the mean: half of a whole row, less under a document mask."""
        if self.documents is None:
            return self.tokens / 2
        if self.packs is not None:
            return self.packs.pairs / self.packs.tokens
        return sum(query_key_pairs(self.tokens, edges) for edges in self.row_boundaries) / (
            len(self.row_boundaries) * self.tokens
        )

    @cached_property
    def _usual(self) -> tuple[int, ...]:
        """Boundaries of the row whose work is nearest to the mean."""
        mean = self.keys_seen * self.tokens
        return min(self.row_boundaries, key=lambda edges: abs(query_key_pairs(self.tokens, edges) - mean))

    @property
    def length_of_work(self) -> float:
        """Length of the documents that the work is in: their mean, weighted by query-key pairs; T for a whole row."""
        if self.documents is None:
            return self.tokens
        lengths = [float(b - a) for edges in self.row_boundaries for a, b in pairwise(edges)]
        return sum(n**3 for n in lengths) / sum(n**2 for n in lengths)

    @cached_property
    def row_boundaries(self) -> tuple[tuple[int, ...], ...]:
        """Boundaries of rows whose documents don't see each other, at this length; none where they do.

        Documents are repeated or cut off where the length is not the rows' own.
        """
        return tuple(at_length(edges, self.tokens) for edges in self.documents or ())

    @property
    def _heaviest(self) -> tuple[int, ...] | None:
        """Boundaries of the row with the longest document: the most keys to gather."""
        if self.documents is None:
            return None
        return max(self.row_boundaries, key=lambda edges: max(b - a for a, b in pairwise(edges)))

    def _attention(self, boundaries: tuple[int, ...] | None) -> AttentionTrace:
        micro = rows = self.config.micro_batch_size
        tokens = self.tokens
        if boundaries is not None:
            starts = [start + row * tokens for row in range(micro) for start in boundaries[:-1]]
            tokens, rows = tokens * micro, 1
            boundaries = (*starts, tokens)
        parallel = self.config.parallel
        return attention_trace(
            AttentionWorkload(
                tokens=tokens,
                boundaries=boundaries,
                rows=rows,
                heads=self.shape.heads,
                kv_heads=self.shape.kv_heads,
                head_dim=self.shape.head_dim,
                dtype=str(self.dtype).removeprefix("torch."),
                scheme=parallel.scheme,
                kernel=self.kernel,
                head_chunks=parallel.head_chunks,
                outer=self.context_parallel_size,
            )
        )

    @property
    def kernel(self) -> str:
        """The attention kernel that is planned with."""
        return planned_kernel(self.config.parallel.kernel, self.documents is not None)

    @property
    def rates_of(self) -> str:
        """The kernel whose rates count: `kernel`, or the machine's own choice where it was not measured there."""
        asked, measured = self.config.parallel.kernel, {name for name, _ in self.machine.attention}
        return self.kernel if asked != "auto" or self.kernel in measured else asked

    @property
    def shard(self) -> int | None:
        """GPUs that share the parameters; None where each has them all."""
        return self.config.parallel.fsdp_shard_degree

    @property
    def residual_itemsize(self) -> int:
        """Bytes of an element of the hidden states between layers: autocast leaves them in float32."""
        return FLOAT if self.shard is None or self.dtype == torch.float32 else 2

    @property
    def input_bytes(self) -> float:
        """Bytes of one layer's input on one GPU."""
        return self.share * self.config.micro_batch_size * self.shape.hidden * self.residual_itemsize

    @property
    def output_bytes(self) -> float:
        """Bytes of one layer's attention output on one GPU; the log-sum-exp beside it is float32."""
        return self.share * self.config.micro_batch_size * self.shape.heads * self.shape.head_dim * self.dtype.itemsize

    @property
    def qkv_bytes(self) -> float:
        """Bytes of one layer's queries, keys and values on one GPU."""
        return self.output_bytes * (1 + 2 * self.shape.kv_heads / self.shape.heads)

    @property
    def lse_bytes(self) -> float:
        """Bytes of one layer's log-sum-exp on one GPU."""
        return self.share * self.config.micro_batch_size * self.shape.heads * FLOAT

    @property
    def checkpoints(self) -> int:
        """Layers whose input is stored; the others' are recomputed."""
        return -(-self.shape.layers // self.config.memory.checkpoint_every)

    @cached_property
    def placed(self) -> tuple[int, int, int]:
        """Attention outputs stored on the GPU, attention outputs offloaded, and stored inputs offloaded, in layers."""
        memory, layers = self.config.memory, self.shape.layers
        if not memory.activation_checkpointing:
            return 0, 0, 0
        on_gpu = layers_meant(memory.attention_outputs_on_gpu, layers)
        offloaded = min(layers_meant(memory.attention_outputs_offloaded, layers), layers - on_gpu)
        return on_gpu, offloaded, layers_meant(memory.layer_inputs_offloaded, self.checkpoints)

    @property
    def recomputed(self) -> float:
        """Fraction of the layers whose attention is recomputed in the backward pass."""
        on_gpu, offloaded, _ = self.placed
        return (1 - (on_gpu + offloaded) / self.shape.layers) if self.config.memory.activation_checkpointing else 0.0

    @property
    def outside_parameters(self) -> int:
        """Parameters outside of the layers: embedding and head, one if they are tied."""
        tied = self.shape.multiplied == self.shape.parameters
        return (1 if tied else 2) * self.shape.vocabulary * self.shape.hidden

    @cached_property
    def parameters(self) -> PlannedParameters:
        """What is trained and what is frozen."""
        return planned_parameters(self.model, self.shape, self.config.lora, self.outside_parameters)

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer, its adapters included."""
        return (self.shape.parameters - self.outside_parameters + self.parameters.added) / self.shape.layers

    def with_memory(self, memory: MemoryConfig) -> Workload:
        """The same run with another memory plan; what was traced holds where layers are computed alike."""
        alike = all(getattr(memory, name) == getattr(self.config.memory, name) for name in TRACED_SETTINGS)
        return replace(self, config=replace(self.config, memory=memory), traced=self.trace if alike else None)

    def with_tokens_per_gpu(self, share: int) -> Workload:
        """The same run with rows of so many tokens on a GPU."""
        return replace(self, tokens=share * self.context_parallel_size, traced=None)

    def with_context_parallel_size(self, size: int) -> Workload:
        """The same run with rows shared by so many GPUs, at least."""
        parallel = replace(self.config.parallel, context_parallel_size=size)
        return replace(self, config=replace(self.config, parallel=parallel), gpus=max(self.gpus, size), traced=None)
