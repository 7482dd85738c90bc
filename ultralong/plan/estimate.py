"""Bytes of one configuration of the trainer, item by item.

The trainer holds float32 parameters, gradients and two AdamW states, all of them on every GPU or shared out over
`parallel.shard` of them (FSDP2), and shares a row between the `parallel.sequence` processes of a group. What a step
needs beyond its states is not guessed from a formula: a step is followed on fake tensors through the model's own code
(`ultralong.plan.trace`); what the memory plan keeps, moves or saves is then added and taken off.
"""

from __future__ import annotations

from collections.abc import Callable

from ultralong.plan.job import FLOAT, Job, layer_parameters, outside_parameters
from ultralong.plan.lines import GIB, Line

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
IN_FLIGHT = 2  # moved tensors that are on the device all the same: one on its way, one in use


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
        outside = job.dtype.itemsize * outside_parameters(job)
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
        last = FLOAT * count + max(0.0, (job.dtype.itemsize + FLOAT) * outside_parameters(job) - at_work)
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
    layer, head = layer_parameters(job), job.shape.vocabulary * job.shape.hidden
    return job.dtype.itemsize * (2 * layer + outside_parameters(job) + layer + head)


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
