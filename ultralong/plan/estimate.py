"""Bytes and seconds of one configuration of the trainer, item by item.

The trainer holds float32 parameters, gradients and two AdamW states, all of them on every GPU or shared out over
`parallel.shard` of them (FSDP2), and shares a row between the `parallel.sequence` processes of a group. What a step
needs beyond its states is not guessed from a formula: a step is followed on fake tensors through the model's own code
(`ultralong.plan.trace`); what the memory plan keeps, moves or saves is then added and taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from ultralong.plan.lines import GIB, Line
from ultralong.plan.machine import Machine
from ultralong.plan.shapes import Shape
from ultralong.plan.trace import Trace, trace
from ultralong.training.config import TrainConfig, layers_meant

FLOAT = 4
# Seen on H200s with torch 2.11, CUDA 13: what the driver holds for a process, its kernels and libraries, and what NCCL
# takes beside it.
CONTEXT_BYTES, NCCL_BYTES = 1.0 * GIB, 1.2 * GIB
# The allocator's share of memory that is free and in pieces; growing segments hand most of it back when it is needed.
FRAGMENTED = 0.03
# A process with torch, CUDA and transformers loaded; and what saving a checkpoint copies to the host for a parameter
# beside the optimizer's states.
HOST_BYTES = 3.5 * GIB
SAVED_BYTES = 6
# Both of AdamW's states of a parameter; in 8 bits each has a float32 scale for 256 of them.
STATE_BYTES = {"float32": 8.0, "8bit": 2 * (1 + 4 / 256)}
# Bytes that the tiled loss moves for each logit: the product, its log-sum-exp, the softmax, the change of type.
LOSS_BYTES_A_LOGIT = 42
LOSS_OPERATIONS = 20  # of a tile
_followed: dict[Any, Trace] = {}
IN_FLIGHT = 2  # moved tensors that are on the device all the same: one on its way, one in use


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
    """

    config: TrainConfig
    model: PreTrainedConfig
    shape: Shape
    machine: Machine
    tokens: int
    gpus: int

    @property
    def sequence(self) -> int:
        """GPUs that share a row."""
        return self.config.parallel.sequence

    @property
    def share(self) -> int:
        """Tokens of a row on one GPU."""
        return -(-self.tokens // self.sequence)

    @property
    def passes(self) -> int:
        """Micro-batches of a step on one GPU."""
        groups = self.gpus // self.sequence
        return self.config.rows_per_step // (groups * self.config.rows_at_once)

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return torch.float32 if self.config.dtype == "float32" else torch.bfloat16

    @cached_property
    def trace(self) -> Trace:
        """One micro-batch followed on fake tensors; some seconds, once for plans that differ in what waits where."""
        memory = self.config.memory
        options = {"rows": self.config.rows_at_once, "dtype": self.dtype, "checkpoint_layers": memory.checkpoint_layers,
                   "loss_tile": memory.loss_tile, "layer_tile": memory.layer_tile,
                   "exchanged": (self.config.parallel.stages or 1) if self.sequence > 1 else 0,
                   "gradients_kept": self.gpus > 1 or self.passes > 1, "sharded": self.shard is not None}
        key = (self.model.to_json_string(), self.share, *options.items())
        if key not in _followed:
            _followed[key] = trace(self.model, self.share, **options)
        return _followed[key]

    @property
    def shard(self) -> int | None:
        """GPUs that share the parameters; None where each has them all."""
        return self.config.parallel.shard

    @property
    def stream_bytes(self) -> int:
        """Bytes of an element of the hidden states between layers: autocast leaves them in float32."""
        return FLOAT if self.shard is None or self.dtype == torch.float32 else 2

    @property
    def input_bytes(self) -> float:
        """Bytes of one layer's input on one GPU."""
        return self.share * self.config.rows_at_once * self.shape.hidden * self.stream_bytes

    @property
    def result_bytes(self) -> float:
        """Bytes of one layer's attention result on one GPU; the log-sum-exp beside it is float32."""
        return self.share * self.config.rows_at_once * self.shape.heads * self.shape.head_dim * self.dtype.itemsize

    @property
    def statistic_bytes(self) -> float:
        """Bytes of one layer's log-sum-exp on one GPU."""
        return self.share * self.config.rows_at_once * self.shape.heads * FLOAT

    @property
    def inputs(self) -> int:
        """Layers whose input is kept; the others' are made again."""
        return -(-self.shape.layers // self.config.memory.inputs_every)

    @cached_property
    def placed(self) -> tuple[int, int, int]:
        """Layers whose attention result is kept, whose attention result is moved, and whose kept input is moved."""
        memory, layers = self.config.memory, self.shape.layers
        if not memory.checkpoint_layers:
            return 0, 0, 0
        kept = layers_meant(memory.attention_kept, layers)
        moved = min(layers_meant(memory.attention_host, layers), layers - kept)
        return kept, moved, layers_meant(memory.inputs_host, self.inputs)


def gpu_lines(job: Job) -> list[Line]:
    """Bytes on each GPU at the worst moment of a step."""
    def line(name: str, value: float, counts: bool = True) -> Line:
        return Line("gpu", name, value, "estimated", "bytes", counts)

    count, states = job.shape.parameters / (job.shard or 1), job.config.optimizer.states
    waiting = _waiting(job, line)
    lines = [line("tensors: parameters, float32", FLOAT * count),
             line(f"tensors: AdamW's two states, {states}", STATE_BYTES[states] * count)]
    if job.shard is None:
        lines.append(line("tensors: gradients and activations of a step", job.trace.peak))
    else:
        # The loss comes when no layer is gathered and none has gradients.
        outside = job.dtype.itemsize * _outside(job)
        at_loss, later = outside + job.trace.loss_peak, _gathered_bytes(job) + job.trace.backward_peak
        gathered = outside if at_loss > later else _gathered_bytes(job)
        lines += [line("tensors: gathered parameters and a layer's gradients", gathered),
                  line("tensors: activations of a step", max(at_loss, later) - gathered)]
    if job.config.memory.checkpoint_layers:
        stream = "float32" if job.stream_bytes == FLOAT else "bfloat16"
        lines.append(line(f"layer inputs made for the backward pass, {stream}", job.shape.layers * job.input_bytes,
                          counts=False))
    lines += waiting
    if job.shard is not None:
        # A layer's gradients come when what it kept has gone: the first micro-batch needs room for the larger of both.
        # At the very end, when no layer is at work, those outside of layers are there twice, as they are summed.
        held = job.shape.layers * job.input_bytes * job.config.memory.checkpoint_layers
        at_work = max(0.0, job.trace.backward_peak - held)
        held += sum(each.value for each in waiting)
        room = held if job.passes == 1 else 0.0
        last = FLOAT * count + max(0.0, (job.dtype.itemsize + FLOAT) * _outside(job) - at_work)
        lines.append(line("tensors: gradients, float32, beyond what the layers left", max(0.0, last - room)))
    tensors = sum(each.value for each in lines if each.counts)
    context = CONTEXT_BYTES + (NCCL_BYTES if job.gpus > 1 else 0.0)
    return [*lines, line("free but in pieces", FRAGMENTED * tensors), line("CUDA context and libraries", context)]


def _waiting(job: Job, line: Callable[[str, float], Line]) -> list[Line]:
    """What the memory plan adds to the followed step, which holds all inputs and no result but the one in use."""
    kept, moved, away = job.placed
    layers, every, lines = job.shape.layers, job.config.memory.inputs_every, []
    if every > 1:
        made = job.inputs + min(every, layers) - 1  # a group's own inputs are made again together
        lines.append(line(f"tensors: inputs of {layers - made} layers made again later",
                          -max(0, layers - made) * job.input_bytes))
    if away:
        lines.append(line(f"tensors: inputs of {away} layers on the host", -max(0, away - IN_FLIGHT) * job.input_bytes))
    if kept or moved:
        held = kept + min(moved, IN_FLIGHT) - (1 if job.config.memory.layer_tile else 0)
        lines.append(line(f"tensors: attention results of {kept} layers, log-sum-exp of {kept + moved}",
                          held * job.result_bytes + (kept + moved) * job.statistic_bytes))
    return lines


def _gathered_bytes(job: Job) -> float:
    """Two layers' parameters (one in use, one coming), those outside of layers, gradients of a layer and of the head.

    All in the run's type; while layers still hold what they keep, nothing larger is on its way.
    """
    layer, head = _layer_parameters(job), job.shape.vocabulary * job.shape.hidden
    return job.dtype.itemsize * (2 * layer + _outside(job) + layer + head)


def _outside(job: Job) -> int:
    """Parameters outside of the layers: embedding and head, one if they are tied."""
    tied = job.shape.multiplied == job.shape.parameters
    return (1 if tied else 2) * job.shape.vocabulary * job.shape.hidden


def _layer_parameters(job: Job) -> float:
    return (job.shape.parameters - _outside(job)) / job.shape.layers


def host_lines(job: Job) -> list[Line]:
    """Bytes of the host's memory for one process; what layers left there is given back while a checkpoint is saved."""
    _, moved, away = job.placed
    lines = [Line("host", "interpreter, torch, CUDA", HOST_BYTES, "estimated", "bytes")]
    if away:
        lines.append(Line("host", f"inputs of {away} layers, pinned", away * job.input_bytes, "estimated", "bytes"))
    if moved:
        lines.append(Line("host", f"attention results of {moved} layers, pinned", moved * job.result_bytes, "estimated",
                          "bytes"))
    saved = (SAVED_BYTES + STATE_BYTES[job.config.optimizer.states]) * job.shape.parameters / (job.shard or 1)
    beyond = saved - sum(line.value for line in lines[1:])
    if beyond > 0:
        more = " beyond what was pinned" if len(lines) > 1 else ""
        lines.append(Line("host", f"copies of model and states while a checkpoint is saved{more}", beyond, "estimated",
                          "bytes"))
    return lines


def step_lines(job: Job) -> list[Line]:
    """Seconds of one optimizer step."""
    machine, shape = job.machine, job.shape
    passes = job.passes * job.config.rows_at_once
    forward, backward = _attention(job)
    again = forward * _again(job)
    head = 6.0 * job.share * shape.hidden * shape.vocabulary / machine.matmul_rate(shape.hidden)
    tiles = -(-job.share // job.config.memory.loss_tile)
    head += machine.traffic_seconds(LOSS_OPERATIONS * tiles, LOSS_BYTES_A_LOGIT * job.share * shape.vocabulary)
    # The trace is of a whole micro-batch, whatever its rows.
    matmul = job.trace.multiplied / machine.matmul_rate(shape.hidden) * job.passes
    other = machine.traffic_seconds(job.trace.operations, job.trace.moved) * job.passes
    items = {
        "attention, forward": forward * passes, "attention, computed again": again * passes,
        "attention, backward": backward * passes, "matrix products of the decoder": matmul,
        "layer inputs made again": _made_again(job) * passes,
        "head and loss": head * passes, "all else (memory traffic)": other,
        "exchange between GPUs": _exchange(job) * passes, "sum of gradients over GPUs": _gradients(job),
        "AdamW": machine.update * shape.parameters / (job.shard or 1),
    }
    _, moved, away = job.placed
    copies = 2 * (moved * job.result_bytes + away * job.input_bytes) / machine.link * job.passes
    items["copies to the host and back that nothing hides"] = max(0.0, copies - sum(items.values()))
    waiting = job.trace.operations * job.passes * machine.launch - sum(items.values())
    if waiting > 0:
        items["waiting for operations to be started"] = waiting
    return [Line("step", name, value, machine.basis, "s") for name, value in items.items() if value > 0]


def _again(job: Job) -> float:
    """Share of the layers whose attention is computed again in the backward pass."""
    kept, moved, _ = job.placed
    return (1 - (kept + moved) / job.shape.layers) if job.config.memory.checkpoint_layers else 0.0


def _made_again(job: Job) -> float:
    """Seconds of making the inputs that were not kept: what follows attention in every layer but a group's last."""
    shape = job.shape
    projections = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim  # of q, k and v: before attention
    layer = _layer_parameters(job) - projections
    return (shape.layers - job.inputs) * 2.0 * layer * job.share / job.machine.matmul_rate(shape.hidden)


def _attention(job: Job) -> tuple[float, float]:
    """Seconds of one row's attention on one GPU, forward and backward, in all layers."""
    rates = job.machine.attention_rates(job.config.parallel.kernel, job.shape.head_dim, job.tokens)
    work = 2.0 * job.tokens**2 * job.shape.heads * job.shape.head_dim * job.shape.layers / job.sequence
    return work / rates[0], 2.5 * work / rates[1]


def _exchange(job: Job) -> float:
    """Seconds in which a row's tokens are traded for heads and back (Ulysses), in all layers."""
    if job.sequence == 1:
        return 0.0
    wide, narrow = (count * job.shape.head_dim for count in (job.shape.heads, job.shape.kv_heads))
    forward = 2 * wide + 2 * narrow  # q, k, v there, out back
    backward = 4 * wide + 4 * narrow  # q, k, v, out and its gradient there, three gradients back
    again = forward * _again(job)
    size = (forward + again + backward) * 2 * job.share * job.shape.layers
    return size * (job.sequence - 1) / job.sequence / job.machine.exchange


def _gradients(job: Job) -> float:
    """Seconds of summing float32 gradients over all GPUs, each twice past every GPU; shared out, once, and hidden.

    FSDP2 gathers and sums a layer's while another one computes; what the next step waits for is the first layer's.
    """
    if job.gpus == 1:
        return 0.0
    if job.shard is not None:
        return (2 * job.dtype.itemsize + FLOAT) * job.shape.parameters / job.shape.layers / job.machine.exchange
    return 2 * FLOAT * job.shape.parameters * (job.gpus - 1) / job.gpus / job.machine.exchange


def run_lines(job: Job, seconds: float, price: float | None) -> list[Line]:
    """The whole run: hours, GPU-hours and, with a price for a GPU-hour, its cost."""
    hours = seconds * job.config.steps / 3600
    basis = job.machine.basis
    tokens = job.config.steps * job.config.rows_per_step * job.tokens
    lines = [Line("run", "tokens", tokens / 1e6, "estimated", "million"), Line("run", "time", hours, basis, "h"),
             Line("run", "GPU time", hours * job.gpus, basis, "GPU-hours"),
             Line("run", "tokens a second and GPU", job.config.rows_per_step * job.tokens / seconds / job.gpus, basis,
                  "tokens/s")]
    if price is not None:
        lines.append(Line("run", "cost, in the price's currency", hours * job.gpus * price, "estimated", ""))
    return lines

