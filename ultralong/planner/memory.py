"""Bytes of one configuration of the trainer, item by item.

The trainer holds float32 parameters, gradients and two AdamW states, all of them on every GPU or sharded over
`parallel.fsdp_shard_degree` of them (FSDP2), and splits a row over `parallel.context_parallel_size` processes. What a
step needs beyond its states is not guessed from a formula: a step is followed on fake tensors through the model's own
code (`ultralong.planner.trace`); what the memory plan keeps, moves or saves is then added and taken off. Of sharded
runs every layer's turn in the backward pass is looked at (`ultralong.planner.live_activations`): inputs and results
leave while gradients come, and where few inputs are kept and many made again the worst moment is not the first.
"""

from __future__ import annotations

from ultralong.planner.live_activations import Turn, at_the_loss, turns
from ultralong.planner.report import GIB, Line
from ultralong.planner.workload import FLOAT, Job, layer_parameters, outside_parameters

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
    count, states = job.shape.parameters / (job.shard or 1), job.config.optimizer.state_precision
    lines = [
        _line("parameters, float32", FLOAT * count),
        _line(f"AdamW's two states, {states}", STATE_BYTES[states] * count),
        *(_followed_lines(job) if job.shard is None else _worst_moment(job)),
    ]
    tensors = sum(each.value for each in lines if each.counts)
    context = CONTEXT_BYTES + (NCCL_BYTES if job.gpus > 1 else 0.0)
    return [
        *lines,
        Line("gpu", "free but in pieces", FRAGMENTED * tensors, "estimated", "bytes"),
        Line("gpu", "CUDA context and libraries", context, "estimated", "bytes"),
    ]


def _line(name: str, value: float) -> Line:
    return Line("gpu", f"tensors: {name}", value, "estimated", "bytes")


def _followed_lines(job: Job) -> list[Line]:
    """A step whose gradients were followed too, with what the memory plan adds to it.

    It held all inputs, and no result but the one in use.
    """
    (kept, moved, away), every, layers = job.placed, job.config.memory.checkpoint_every, job.shape.layers
    lines = [_line("gradients and activations of a step", job.trace.peak)]
    if job.config.memory.activation_checkpointing:
        lines.append(
            Line(
                "gpu",
                "layer inputs made for the backward pass",
                layers * job.input_bytes,
                "estimated",
                "bytes",
                counts=False,
            )
        )
    if every > 1:
        made = job.inputs + min(every, layers) - 1  # a group's own inputs are made again together
        lines.append(
            _line(f"inputs of {layers - made} layers made again later", -max(0, layers - made) * job.input_bytes)
        )
    if away:
        lines.append(_line(f"inputs of {away} layers on the host", -max(0, away - IN_FLIGHT) * job.input_bytes))
    if kept or moved:
        held = kept + min(moved, IN_FLIGHT) - (1 if job.config.memory.layer_tile else 0)
        lines.append(
            _line(_results_of(kept, kept + moved), held * job.result_bytes + (kept + moved) * job.statistic_bytes)
        )
    return lines


def _worst_moment(job: Job) -> list[Line]:
    """Of a sharded step: the loss, a layer's turn in the backward pass, or the end, when gradients are summed."""
    memory, count = job.config.memory, job.shape.parameters / job.shard
    outside = outside_parameters(job) * job.dtype.itemsize
    inputs = (
        job.shape.layers * job.input_bytes * memory.activation_checkpointing
    )  # that the followed step held all the time
    # A layer's gradients come when what it kept has gone; those of a second micro-batch are added to the first one's.
    each = FLOAT * layer_parameters(job) / job.shard
    early = job.passes > 1 or not memory.activation_checkpointing
    loss = [
        _line("gathered parameters outside of layers", outside),
        _line("activations of the loss", job.trace.loss_peak - inputs),
    ]
    work = [
        _line("gathered parameters and a layer's gradients", _gathered_bytes(job)),
        _line("activations of the layer at work", job.trace.backward_peak - inputs),
    ]
    moments = [[*loss, *_waiting(job, at_the_loss(job), FLOAT * count * (job.passes > 1))]]
    moments += [[*work, *_waiting(job, turn, FLOAT * count if early else each * turn.done)] for turn in turns(job)]
    # When no layer is at work any more, the gradients outside of layers are there twice, as they are summed.
    ends = (job.dtype.itemsize + FLOAT) * outside_parameters(job)
    moments.append(
        [
            _line("gathered parameters and gradients outside of layers", outside + ends),
            _line("gradients, float32", FLOAT * count),
        ]
    )
    return max(moments, key=lambda lines: sum(line.value for line in lines))


def _waiting(job: Job, turn: Turn, gradients: float) -> list[Line]:
    (kept, moved, _), lines = job.placed, []
    if job.config.memory.activation_checkpointing:
        lines.append(_line(f"inputs of {turn.inputs} layers", turn.inputs * job.input_bytes))
    if kept or moved:
        lines.append(
            _line(
                _results_of(turn.results, kept + moved),
                turn.results * job.result_bytes + (kept + moved) * job.statistic_bytes,
            )
        )
    return [*lines, _line("gradients, float32", gradients)] if gradients else lines


def _results_of(layers: int, statistics: int) -> str:
    return f"attention results of {layers} layers, log-sum-exp of {statistics}"


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
        lines.append(
            Line("host", f"attention results of {moved} layers, pinned", moved * job.result_bytes, "estimated", "bytes")
        )
    saved = (SAVED_BYTES + STATE_BYTES[job.config.optimizer.state_precision]) * job.shape.parameters / (job.shard or 1)
    beyond = saved - sum(line.value for line in lines[1:])
    if beyond > 0:
        more = " beyond what was pinned" if len(lines) > 1 else ""
        lines.append(
            Line("host", f"copies of model and states while a checkpoint is saved{more}", beyond, "estimated", "bytes")
        )
    return lines
