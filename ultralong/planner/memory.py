"""Bytes of one configuration of the trainer, item by item.

The trainer holds float32 parameters, gradients and two AdamW states, all of them on every GPU or sharded over
`parallel.fsdp_shard_degree` of them (FSDP2), and splits a row over `parallel.context_parallel_size` processes. Frozen
parameters (LoRA) have neither gradients nor states. What a step needs beyond its states is not guessed from a formula:
a step is traced on fake tensors through the model's own code and the real attention scheme (`planner.traces`);
what the memory plan stores, offloads or recomputes is then added and taken off. Of sharded runs every layer's turn in
the backward pass is looked at (`ultralong.planner.live_activations`): inputs and outputs leave while gradients come,
and where few inputs are stored and many recomputed the worst moment is not the first.
"""

from __future__ import annotations

from ultralong.planner.live_activations import LiveActivations, live_in_backward, live_in_loss
from ultralong.planner.report import PlanLine
from ultralong.planner.workload import FLOAT, Workload
from ultralong.training.adapters.four_bits import BYTES
from ultralong.training.config import STATE_BYTES
from ultralong.utils.environment import GIB

# Seen on H200s with torch 2.11, CUDA 13: what the driver holds for a process, its kernels and libraries, and what NCCL
# takes beside it.
CONTEXT_BYTES, NCCL_BYTES = 1.0 * GIB, 1.2 * GIB
# Memory lost to the allocator's fragmentation, as a fraction of the tensors; growing segments return most of it when it
# is needed.
FRAGMENTATION = 0.03
# A process with torch, CUDA and transformers loaded; and what saving a checkpoint copies to the host for a parameter
# beside the optimizer's states.
HOST_BYTES = 3.5 * GIB
SAVED_BYTES = 6
IN_FLIGHT = 2  # offloaded tensors that are on the device all the same: one on its way, one in use


def gpu_memory(workload: Workload) -> list[PlanLine]:
    """Bytes on each GPU at the worst moment of a step."""
    count, states = workload.parameters.trained / (workload.shard or 1), workload.config.optimizer.state_precision
    held = workload.parameters.in_four_bits / (workload.shard or 1)
    frozen = workload.parameters.frozen / (workload.shard or 1) - held
    size = workload.dtype.itemsize if workload.shard else FLOAT  # FSDP2 holds frozen parameters in the run's type
    lines = [
        *([_tensors(f"frozen parameters, {size} bytes each", size * frozen)] if frozen else []),
        *([_tensors("frozen matrices, 4 bits and their scales each", BYTES * held)] if held else []),
        _tensors("parameters, float32", FLOAT * count),
        _tensors(f"AdamW's two states, {states}", STATE_BYTES[states] * count),
        *(_whole_step(workload) if workload.shard is None else _worst_moment(workload)),
    ]
    tensors = sum(each.value for each in lines if each.counts)
    context = CONTEXT_BYTES + (NCCL_BYTES if workload.gpus > 1 else 0.0)
    return [
        *lines,
        PlanLine("gpu", "lost to fragmentation", FRAGMENTATION * tensors, "estimated", "bytes"),
        PlanLine("gpu", "CUDA context and libraries", context, "estimated", "bytes"),
    ]


def gpu_total(workload: Workload) -> float:
    """Their sum."""
    return sum(line.value for line in gpu_memory(workload) if line.counts)


def _tensors(name: str, value: float) -> PlanLine:
    return PlanLine("gpu", f"tensors: {name}", value, "estimated", "bytes")


def _whole_step(workload: Workload) -> list[PlanLine]:
    """A step whose gradients were traced too, with what the memory plan adds to it.

    The traced one stored all inputs, and no attention output but the one in use.
    """
    later = None if workload.recomputed else _qkv_later(workload)
    (on_gpu, offloaded, offloaded_inputs), memory = workload.placed, workload.config.memory
    every, layers = memory.checkpoint_every, workload.shape.layers
    lines = [_tensors("gradients and activations of a step", workload.trace.peak(later))]
    if memory.activation_checkpointing:
        name, value = "layer inputs stored for the backward pass", layers * workload.input_bytes
        lines.append(PlanLine("gpu", name, value, "estimated", "bytes", counts=False))
    if every > 1:
        stored = workload.checkpoints + min(every, layers) - 1  # a group's own inputs are recomputed together
        saved = max(0, layers - stored) * workload.input_bytes
        lines.append(_tensors(f"inputs of {layers - stored} layers recomputed later", -saved))
    if offloaded_inputs:
        saved = max(0, offloaded_inputs - IN_FLIGHT) * workload.input_bytes
        lines.append(_tensors(f"inputs of {offloaded_inputs} layers offloaded", -saved))
    if on_gpu or offloaded:
        stored = on_gpu + min(offloaded, IN_FLIGHT) - (1 if memory.layer_tile else 0)
        lines.append(_outputs(workload, on_gpu, stored))
    return lines


def _worst_moment(workload: Workload) -> list[PlanLine]:
    """Of a sharded step: the loss, a layer's turn in the backward pass, or the end, when gradients are summed."""
    assert workload.shard is not None
    memory, count = workload.config.memory, workload.parameters.trained / workload.shard
    copies = workload.parameters.outside if workload.config.lora.on else 0  # beside their frozen originals
    outside = (workload.outside_parameters + copies) * workload.dtype.itemsize
    # The traced step stored all inputs all the time.
    inputs = workload.shape.layers * workload.input_bytes * memory.activation_checkpointing
    # A layer's gradients come when what it stored has gone; those of a second micro-batch are added to the first one's.
    each = FLOAT * workload.parameters.in_layers / workload.shape.layers / workload.shard
    early = workload.passes > 1 or not memory.activation_checkpointing
    loss = [
        # What the last layer's parameters were gathered into is kept until the loss is there.
        _tensors("gathered parameters", outside + _gathered_early(workload)),
        _tensors("activations of the loss", workload.trace.before_backward - inputs),
    ]
    moments = [[*loss, *_live(workload, live_in_loss(workload), FLOAT * count * (workload.passes > 1))]]
    for live in live_in_backward(workload):
        later = _qkv_later(workload) if live.attention_done else None
        at_work = [
            _tensors("gathered parameters and a layer's gradients", _gathered_at(workload, live)),
            _tensors("activations of the layer at work", workload.trace.in_backward(later) - inputs),
        ]
        moments.append([*at_work, *_live(workload, live, FLOAT * count if early else each * live.layers_done)])
    # When no layer is at work any more, the gradients outside of layers are there twice, as they are summed.
    ends = (workload.dtype.itemsize + FLOAT) * workload.parameters.outside
    moments.append(
        [
            _tensors("gathered parameters and gradients outside of layers", outside + ends),
            _tensors("gradients, float32", FLOAT * count),
        ]
    )
    return max(moments, key=lambda lines: sum(line.value for line in lines))


def _live(workload: Workload, live: LiveActivations, gradients: float) -> list[PlanLine]:
    lines = []
    if workload.config.memory.activation_checkpointing:
        lines.append(_tensors(f"inputs of {live.inputs} layers", live.inputs * workload.input_bytes))
    if any(workload.placed[:2]):
        lines.append(_outputs(workload, live.outputs, live.outputs))
    return [*lines, _tensors("gradients, float32", gradients)] if gradients else lines


def _outputs(workload: Workload, layers: int, stored: int) -> PlanLine:
    """Attention outputs said to be of some layers, and the log-sum-exp of all that are not recomputed."""
    lse = sum(workload.placed[:2])
    value = stored * workload.output_bytes + lse * workload.lse_bytes
    return _tensors(f"attention outputs of {layers} layers, log-sum-exp of {lse}", value)


def _qkv_later(workload: Workload) -> float | None:
    """See `LayerTrace.in_backward`: layers with a custom backward pass compute q, k and v when they are needed."""
    return workload.qkv_bytes if workload.config.memory.layer_tile else None


def _gathered_early(workload: Workload) -> float:
    """A layer's parameters in the run's type, gathered while another one's are in use; one GPU gathers nothing."""
    return _of_layer(workload) * ((workload.shard or 1) > 1)


def _of_layer(workload: Workload) -> float:
    """A layer's parameters as they are gathered: in the run's type, or as codes."""
    held = workload.parameters.in_four_bits / workload.shape.layers
    return workload.dtype.itemsize * (workload.layer_parameters - held) + BYTES * held


def _dequantised(workload: Workload) -> float:
    """The matrix at work, made again from its codes: their indices in 64 bits, both halves, the products, the whole."""
    return (2 * 4 + 3 * workload.dtype.itemsize) * workload.parameters.largest_in_four_bits


def _gathered_at(workload: Workload, live: LiveActivations) -> float:
    """At a layer's turn: its parameters, the next one's, those outside of layers, and gradients that are not sharded.

    Those are the head's, and the last layer's in float32, which are being summed.
    """
    head = workload.shape.vocabulary * workload.shape.hidden * workload.parameters.head
    in_type = workload.outside_parameters + head
    summed = FLOAT * workload.parameters.in_layers / workload.shape.layers if live.layers_done else 0.0
    layers = _of_layer(workload) + _gathered_early(workload) + _dequantised(workload)
    return workload.dtype.itemsize * in_type + layers + summed


def host_memory(workload: Workload) -> list[PlanLine]:
    """Bytes of the host's memory for one process; offloaded activations are released while a checkpoint is saved."""
    _, offloaded, offloaded_inputs = workload.placed
    items = {"interpreter, torch, CUDA": HOST_BYTES}
    if offloaded_inputs:
        items[f"inputs of {offloaded_inputs} layers, pinned"] = offloaded_inputs * workload.input_bytes
    if offloaded:
        items[f"attention outputs of {offloaded} layers, pinned"] = offloaded * workload.output_bytes
    states = STATE_BYTES[workload.config.optimizer.state_precision]
    count = workload.parameters.trained / (workload.shard or 1)
    if staged := staged_bytes(workload):
        items["model and states for checkpoints in the background, pinned"] = staged
    beyond = (SAVED_BYTES + states) * count + HOST_BYTES - sum(items.values())
    if beyond > 0:
        more = " beyond what was pinned" if len(items) > 1 else ""
        items[f"copies of model and states while a checkpoint is saved{more}"] = beyond
    return [PlanLine("host", name, value, "estimated", "bytes") for name, value in items.items()]


def staged_bytes(workload: Workload) -> float:
    """Bytes of the host's memory that `async_checkpoints` takes from one process over the whole run."""
    if not workload.config.async_checkpoints:
        return 0.0
    states = STATE_BYTES[workload.config.optimizer.state_precision]
    return (FLOAT + states) * workload.parameters.trained / (workload.shard or 1)
