"""Bytes and seconds of one configuration of the trainer, item by item.

The trainer holds float32 parameters, gradients and two AdamW states on every GPU, computes under autocast, and shares a
row between the `parallel.sequence` processes of a group. What a step needs beyond its states is not guessed from a
formula: a step is followed on fake tensors through the model's own code (`ultralong.plan.trace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from ultralong.plan.lines import GIB, Line
from ultralong.plan.machine import Machine
from ultralong.plan.shapes import Shape
from ultralong.plan.trace import Trace, trace
from ultralong.training.config import TrainConfig

FLOAT = 4
# Seen on an H200 with torch 2.11, CUDA 13: what the driver holds for a process, its kernels and libraries.
CONTEXT_BYTES = 1.0 * GIB
# The allocator's share of memory that is free and in pieces; growing segments hand most of it back when it is needed.
FRAGMENTED = 0.03
# A process with torch, CUDA and transformers loaded; and what saving a checkpoint copies to the host for a parameter.
HOST_BYTES = 3.5 * GIB
SAVED_BYTES = 14
# Bytes that the tiled loss moves for each logit: the product, its log-sum-exp, the softmax, the change of type.
LOSS_BYTES_A_LOGIT = 42
LOSS_OPERATIONS = 20  # of a tile


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
        """One micro-batch followed on fake tensors; some seconds, once."""
        memory = self.config.memory
        return trace(self.model, self.share, rows=self.config.rows_at_once, dtype=self.dtype,
                     checkpoint_layers=memory.checkpoint_layers, loss_tile=memory.loss_tile,
                     exchanged=self.sequence > 1, gradients_kept=self.gpus > 1 or self.passes > 1)


def gpu_lines(job: Job) -> list[Line]:
    """Bytes on each GPU at the worst moment of a step."""
    def line(name: str, value: float, counts: bool = True) -> Line:
        return Line("gpu", name, value, "estimated", "bytes", counts)

    count = job.shape.parameters
    inputs = job.shape.layers * job.share * job.config.rows_at_once * job.shape.hidden * FLOAT
    states = 3 * FLOAT * count
    lines = [line("tensors: parameters, float32", FLOAT * count),
             line("tensors: AdamW's two states, float32", 2 * FLOAT * count),
             line("tensors: gradients and activations of a step", job.trace.peak)]
    if job.config.memory.checkpoint_layers:
        lines.append(line("layer inputs kept for the backward pass, float32", inputs, counts=False))
    return [*lines, line("free but in pieces", FRAGMENTED * (states + job.trace.peak)),
            line("CUDA context and libraries", CONTEXT_BYTES)]


def host_lines(job: Job) -> list[Line]:
    """Bytes of the host's memory for the process that saves."""
    return [Line("host", "interpreter, torch, CUDA", HOST_BYTES, "estimated", "bytes"),
            Line("host", "copies of model and states while a checkpoint is saved", SAVED_BYTES * job.shape.parameters,
                 "estimated", "bytes")]


def step_lines(job: Job) -> list[Line]:
    """Seconds of one optimizer step."""
    machine, shape = job.machine, job.shape
    passes = job.passes * job.config.rows_at_once
    forward, backward = _attention(job)
    again = forward if job.config.memory.checkpoint_layers else 0.0
    head = 6.0 * job.share * shape.hidden * shape.vocabulary / machine.matmul_rate(shape.hidden)
    tiles = -(-job.share // job.config.memory.loss_tile)
    head += machine.traffic_seconds(LOSS_OPERATIONS * tiles, LOSS_BYTES_A_LOGIT * job.share * shape.vocabulary)
    # The trace is of a whole micro-batch, whatever its rows.
    matmul = job.trace.multiplied / machine.matmul_rate(shape.hidden) * job.passes
    other = machine.traffic_seconds(job.trace.operations, job.trace.moved) * job.passes
    items = {
        "attention, forward": forward * passes, "attention, computed again": again * passes,
        "attention, backward": backward * passes, "matrix products of the decoder": matmul,
        "head and loss": head * passes, "all else (memory traffic)": other,
        "exchange between GPUs": _exchange(job) * passes, "sum of gradients over GPUs": _gradients(job),
        "AdamW": machine.update * shape.parameters,
    }
    waiting = job.trace.operations * job.passes * machine.launch - sum(items.values())
    if waiting > 0:
        items["waiting for operations to be started"] = waiting
    return [Line("step", name, value, machine.basis, "s") for name, value in items.items() if value > 0]


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
    again = forward if job.config.memory.checkpoint_layers else 0
    size = (forward + again + backward) * 2 * job.share * job.shape.layers
    return size * (job.sequence - 1) / job.sequence / job.machine.exchange


def _gradients(job: Job) -> float:
    """Seconds of summing float32 gradients over all GPUs, each twice past every GPU."""
    if job.gpus == 1:
        return 0.0
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

