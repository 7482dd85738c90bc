"""One training step's layers traced on fake tensors: what they allocate beyond a run's states, and how much work it is.

The model and the trainer's own layers run; attention is left out here, but for its inputs and results, and traced by
itself (`ultralong.planner.traces.attention`): it alone depends on who shares the row, and how.
"""

from __future__ import annotations

import contextlib
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ultralong.attention.protocol import AttentionContextLike
from ultralong.attention.scheme import Gradients, OutLse, Scheme, attention
from ultralong.attention.spec import AttentionSpec
from ultralong.planner.traces.fake_loss import fake_head_loss
from ultralong.planner.traces.models import config_of, fake_model, plain
from ultralong.planner.traces.shape_tensors import ShapeMode
from ultralong.planner.traces.tracker import Tracker
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import trained_parameters
from ultralong.training.config import MemoryConfig
from ultralong.training.memory.activation_memory import ActivationMemory

# Layers that stand for a deep model's: what one more adds, the next one adds as well. Where layers are not checkpointed
# the first one's input is another kind of tensor than the second's.
TRACED_LAYERS, TRACED_STORED_LAYERS = (1, 2), (2, 3)
TRACED_TILES = (2, 3)  # tiles that stand for a long row's


@dataclass(frozen=True)
class LayerTrace:
    """What one forward and backward pass of one micro-batch does on one rank, attention itself left out.

    Bytes are those alive at once: gradients are counted, parameters and optimizer states are not. A moment that does
    not come has 0.

    Attributes:
        forward: Most bytes in the forward pass of the layers, outside attention.
        at_attention: Bytes when a layer's attention begins, the most of all layers.
        loss: Most bytes in the loss.
        backward: Most bytes in the backward pass, outside attention and what follows a recomputed attention.
        at_recompute: Bytes when attention is computed again in the backward pass, the most of all layers.
        recomputed: Most bytes from there to attention's backward pass.
        at_backward: Bytes when attention's backward pass begins, the most of all layers.
        multiplied: FLOP of matrix products in the decoder, recomputation included; the head's are left out.
        moved: Bytes read and written by everything else, but for what `strided` counts.
        operations: Kernels to start.
        strided: Elements of elementwise operations on tensors of different layouts (`Tracker.strided`).
    """

    forward: float
    at_attention: float
    loss: float
    backward: float
    at_recompute: float
    recomputed: float
    at_backward: float
    multiplied: float
    moved: float
    operations: float
    strided: float

    def towards(self, other: LayerTrace, part: float) -> LayerTrace:
        """What lies so far on the straight line from this one (0) through another (1)."""
        return LayerTrace(*(a + part * (b - a) for a, b in zip(astuple(self), astuple(other), strict=True)))

    def before_backward(self, attention: float) -> float:
        """Most bytes before the backward pass begins, where attention allocates so many itself."""
        return max(self.forward, self.loss, self.at_attention + attention)

    def in_backward(self, attention: float, attention_backward: float, later: float | None = None) -> float:
        """Most bytes in the backward pass, where attention's two passes allocate so many themselves.

        Args:
            attention: Bytes of attention's forward pass.
            attention_backward: Bytes of its backward pass.
            later: Bytes of q, k and v, where a layer finds its attention output stored and they come after its
                feed-forward layer's gradients only; None where attention is recomputed.
        """
        alike = max(self.backward, self.at_backward + attention_backward)
        if later is not None:
            return max(alike, self.recomputed - later)
        return max(alike, self.recomputed, self.at_recompute + attention if self.at_recompute else 0.0)


@dataclass(frozen=True)
class StepSettings:
    """What a step's layers depend on beside the model and the tokens.

    Attributes:
        rows: Rows at a time.
        dtype: What the forward pass computes in; parameters are float32, as the trainer holds them.
        activation_checkpointing: As in `MemoryConfig`.
        loss_tile: As in `MemoryConfig`.
        layer_tile: As in `MemoryConfig`.
        gradients_kept: All gradients exist before the pass (a later micro-batch, or the buckets of several ranks).
        sharded: Parameters are sharded (FSDP2): computed with in `dtype`, their gradients given up layer by layer.
        lora: Adapters, as in `TrainConfig`.
    """

    rows: int = 1
    dtype: torch.dtype = torch.bfloat16
    activation_checkpointing: bool = False
    loss_tile: int = 2048
    layer_tile: int = 0
    gradients_kept: bool = False
    sharded: bool = False
    lora: LoRAConfig = field(default_factory=LoRAConfig)


def trace_layers(config: PreTrainedConfig, tokens: int, settings: StepSettings) -> LayerTrace:
    """Trace one micro-batch of the trainer on fake tensors.

    Layers are alike and so are tiles: two depths give the line through all layers, two lengths that through all tiles.

    Args:
        config: The model.
        tokens: Tokens of a row on one rank.
        settings: How the step is computed.
    """
    depth = config.get_text_config().num_hidden_layers
    model = plain(config, min(depth, 3)).to_json_string(use_diff=False)  # one trace for all depths of a model
    tile = max(settings.layer_tile, settings.loss_tile)
    few, more = (tile * count for count in TRACED_TILES)
    if settings.layer_tile and tokens > more:
        short, longer = (_of_all_layers(model, depth, length, settings) for length in (few, more))
        return short.towards(longer, (tokens - few) / (more - few))
    return _of_all_layers(model, depth, tokens, settings)


def _of_all_layers(model: str, layers: int, tokens: int, settings: StepSettings) -> LayerTrace:
    few, more = TRACED_LAYERS if settings.activation_checkpointing else TRACED_STORED_LAYERS
    if layers <= more:
        return traced(model, tokens, settings, layers)
    low, high = (traced(model, tokens, settings, count) for count in (few, more))
    return low.towards(high, (layers - few) / (more - few))


@lru_cache(maxsize=1024)
def traced(model: str, tokens: int, settings: StepSettings, layers: int) -> LayerTrace:
    """The trace of a model's first layers.

    Args:
        model: The model's config as JSON.
        tokens: Tokens of a row on one rank.
        settings: How the step is computed.
        layers: How many layers.
    """
    config = plain(config_of(model), layers)
    dtype = settings.dtype if settings.sharded else torch.float32
    with ShapeMode(), torch.random.fork_rng(devices=[]):
        made = fake_model(config, dtype, settings.lora)
        return trace_step(made, torch.zeros(settings.rows, tokens, dtype=torch.int64), settings)


def trace_step(model: PreTrainedModel, ids: Tensor, settings: StepSettings) -> LayerTrace:
    """Run and trace a step of a model; its tensors may be real.

    Args:
        model: The model; its layers are told how to run.
        ids: (B, T) of any values.
        settings: How the step is computed.
    """
    if settings.activation_checkpointing:
        ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=settings.layer_tile))
    for _, parameter in trained_parameters(model) if settings.sharded else ():
        parameter.register_post_accumulate_grad_hook(_give_up)
    with Tracker() as tracker:
        if settings.gradients_kept and not settings.sharded:
            for _, parameter in trained_parameters(model):
                parameter.grad = torch.empty_like(parameter)
        moments = _Moments(tracker)
        total = _loss(model, ids, settings, moments)
        moments.begin_backward()
        total.backward()
        live, peaks = moments.live, tracker.peaks
        return LayerTrace(
            forward=peaks["forward"],
            at_attention=live["forward"],
            loss=peaks["loss"],
            backward=peaks["backward"],
            at_recompute=live["recompute"],
            recomputed=peaks["recomputed"],
            at_backward=live["backward"],
            multiplied=tracker.multiplied,
            moved=tracker.moved - tracker.strided_moved,
            operations=tracker.operations,
            strided=tracker.strided,
        )


class _Moments:
    """Tells the tracker which part of a step runs, from the calls of attention.

    Attributes:
        live: Most bytes alive when attention's forward pass, its recomputation or its backward pass began.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._in_backward = tracker, False
        self.live = {"forward": 0, "recompute": 0, "backward": 0}
        tracker.moment = "forward"

    def begin_loss(self) -> None:
        self._tracker.moment = "loss"

    def begin_backward(self) -> None:
        self._tracker.moment, self._in_backward = "backward", True

    @contextlib.contextmanager
    def attention(self, backward: bool) -> Any:
        """Around one of attention's passes."""
        part = "backward" if backward else "recompute" if self._in_backward else "forward"
        self.live[part] = max(self.live[part], self._tracker.live)
        self._tracker.moment = "attention"
        yield
        self._tracker.moment = {"recompute": "recomputed"}.get(part, part)


class ResultsOnly(Scheme):
    """A scheme that makes attention's results and nothing else."""

    def __init__(self, moments: _Moments) -> None:
        self._moments = moments

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """Out (B, T, H, D) and lse (B, H, T)."""
        with self._moments.attention(backward=False):
            lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
            return torch.empty_like(q, memory_format=torch.contiguous_format), lse

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        *,
        fp32_grads: bool = False,
    ) -> Gradients:
        """The gradients of q, k and v."""
        with self._moments.attention(backward=True):
            dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
            return dq, dk, dv


class ResultsContext(AttentionContextLike):
    """What the trainer's layers and transformers' ask of an attention context, with `ResultsOnly`."""

    def __init__(self, moments: _Moments) -> None:
        self._scheme = ResultsOnly(moments)

    def scheme_and_spec(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Scheme, AttentionSpec]:
        """The scheme, and a spec that it does not look at."""
        return self._scheme, AttentionSpec(scale=1.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Differentiable results (B, T, H, D)."""
        return attention(q, k, v, *self.scheme_and_spec(q, k, v))


def _give_up(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(model: PreTrainedModel, ids: Tensor, settings: StepSettings, moments: _Moments) -> Tensor:
    narrow = settings.dtype != torch.float32 and not settings.sharded
    with torch.autocast("cpu", dtype=settings.dtype) if narrow else contextlib.nullcontext():
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        hidden = model.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, attention_context=ResultsContext(moments)
        ).last_hidden_state
        moments.begin_loss()
        head = model.get_output_embeddings().weight
        return fake_head_loss(hidden.flatten(0, 1), head, settings.loss_tile, settings.dtype)
