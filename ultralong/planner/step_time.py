"""Seconds of one configuration of the trainer, item by item, and what the whole run takes."""

from __future__ import annotations

import math

import numpy as np

from ultralong.data.rows.short_contexts import short_contexts
from ultralong.planner.report import PlanLine
from ultralong.planner.traces.attention import PassTrace
from ultralong.planner.workload import FLOAT, Workload
from ultralong.training.adapters.four_bits import BYTES
from ultralong.training.config import STATE_BYTES
from ultralong.training.save_pace import DEAREST, steps_between
from ultralong.training.step import SHORT_TOKENS
from ultralong.utils.units import GIB

# What the tiled loss moves beside its products: each logit for the log-sum-exp (read twice) and for the gradient (read,
# and written in two bytes), and for each tile the head's gradient, float32, which the tile's own is added to.
LOSS_BYTES_A_LOGIT = 14
LOSS_BYTES_A_WEIGHT = 12
LOSS_OPERATIONS = 12  # of a tile
# Recorded on two H200s, 22.6 GiB of each process (notebooks/results/saves_2gpu_h200.json): bytes/s of the disk that all
# is hashed and written with, 39 s, and of one process's copy to the host, with what it slows steps beside it, 1.57 s.
WRITTEN, COPIED = 1.24e9, 15.4e9
SHORTEST_STOP = 30.0  # seconds that torchrun of torch 2.11 gives its processes, whatever the launch scripts ask for


def step_time(workload: Workload) -> list[PlanLine]:
    """Seconds of one optimizer step."""
    machine, layers = workload.machine, workload.trace.layers
    forward, backward = _attention(workload)
    moved, operations = _beside_attention(workload)
    traffic = machine.traffic_seconds(operations, moved, layers.strided)
    again, passes = workload.recomputed, workload.passes
    items = {
        "attention, forward": forward * passes,
        "attention, recomputed": forward * again * passes,
        "attention, backward": backward * passes,
        "matrix products of the decoder": layers.multiplied / machine.matmul_rate(workload.shape.hidden) * passes,
        "layer inputs recomputed": _recomputed_inputs(workload) * passes,
        "head and loss": _head(workload) * passes,
        "all else (memory traffic)": traffic * passes,
        "exchange between GPUs": _exchange(workload) * passes,
        "sum of gradients over GPUs": _gradients(workload),
        "AdamW": machine.update * workload.parameters.trained / (workload.shard or 1),
        "gradient clipping": machine.traffic_seconds(0, _clipped(workload)),
        "parameters and gradients copied by FSDP": machine.traffic_seconds(0, _copied_states(workload)),
    }
    _, offloaded, offloaded_inputs = workload.placed
    copied = offloaded * workload.output_bytes + offloaded_inputs * workload.input_bytes
    items["copies to the host and back that nothing hides"] = max(
        0.0, 2 * copied / machine.link * passes - sum(items.values())
    )
    items["parameters gathered and gradients summed that nothing hides"] = max(
        0.0, shards_travel(workload) - sum(items.values())
    )
    launches = operations * passes * machine.launch - sum(items.values())
    if launches > 0:
        items["waiting for operations to be launched"] = launches
    if workload.packs is not None:
        items["waiting for the group with the most work"] = (workload.packs.waiting - 1) * sum(items.values())
    items["short contexts of LongCE"] = _short_contexts(workload) * passes  # before the long pass, and hides nothing
    return [PlanLine("step", name, value, machine.basis, "s") for name, value in items.items() if value > 0]


def _over_layers(workload: Workload, forward: float, backward: float) -> float:
    """Something of one layer's attention in all layers, the recomputed ones' forward pass twice."""
    return workload.shape.layers * (forward * (1 + workload.recomputed) + backward)


def _attention(workload: Workload) -> tuple[float, float]:
    """Seconds of one micro-batch's attention on the busiest GPU, forward and backward, in all layers."""
    attention, scale = workload.usual_attention, workload.shape.layers * workload.work_over_usual
    scale *= workload.shape.window_share(workload.tokens, workload.row_boundaries)
    length = round(workload.length_of_work)
    rates = workload.machine.attention_rates(workload.rates_of, workload.shape.head_dim, length)
    return attention.forward.flops * scale / rates[0], attention.backward.flops * scale / rates[1]


def _beside_attention(workload: Workload) -> tuple[float, float]:
    """Bytes moved and kernels launched for a micro-batch, without products, attention and strided operations."""
    layers, attention = workload.trace.layers, workload.usual_attention
    moved = layers.moved + _over_layers(workload, attention.forward.moved, attention.backward.moved)
    operations = _over_layers(workload, attention.forward.operations, attention.backward.operations)
    return moved, layers.operations + operations


def _head(workload: Workload) -> float:
    """Seconds of the head and the loss of one micro-batch."""
    machine, shape, tokens = workload.machine, workload.shape, workload.share * workload.config.micro_batch_size
    each = 6.0 if workload.parameters.head else 4.0
    products = each * tokens * shape.hidden * shape.vocabulary / machine.matmul_rate(shape.hidden)
    tiles = -(-tokens // workload.config.memory.loss_tile)
    moved = (LOSS_BYTES_A_LOGIT * tokens + LOSS_BYTES_A_WEIGHT * tiles * shape.hidden) * shape.vocabulary
    return products + machine.traffic_seconds(LOSS_OPERATIONS * tiles, moved)


def _recomputed_inputs(workload: Workload) -> float:
    """Seconds of recomputing inputs that were not stored: what follows attention in every layer but a group's last."""
    shape, tokens = workload.shape, workload.share * workload.config.micro_batch_size
    projections = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim  # of q, k and v: before attention
    layer = workload.layer_parameters - projections
    products = (shape.layers - workload.checkpoints) * 2.0 * layer * tokens
    return products / workload.machine.matmul_rate(shape.hidden)


def _short_contexts(workload: Workload) -> float:
    """Seconds of reading a micro-batch's rows again in short contexts: forward passes, dealt to those who share it.

    What else than products and attention a forward pass takes is put as a third of what the whole step's two passes
    take beside them, for as many tokens.
    """
    weights, machine, shape = workload.config.long_ce, workload.machine, workload.shape
    if not weights.weight_cap:
        return 0.0
    rows = workload.row_boundaries or (None,)
    found = [
        short_contexts(np.zeros((1, workload.tokens), dtype=np.int8), edges, weights.short_context, weights.stride)
        for edges in rows
    ]
    share = workload.config.micro_batch_size / workload.context_parallel_size / len(rows)
    tokens = share * sum(context.length for contexts in found for context in contexts)
    targets = share * sum(context.end - context.first for contexts in found for context in contexts)
    pairs = share * sum(context.length**2 / 2 for contexts in found for context in contexts)
    flops = 4.0 * pairs * shape.heads * shape.head_dim * shape.layers
    length = weights.short_context + weights.stride - 1
    forward, _ = machine.attention_rates(workload.rates_of, shape.head_dim, length)
    products = 2.0 * tokens * workload.layer_parameters * shape.layers + 2.0 * targets * shape.hidden * shape.vocabulary
    local = workload.share * workload.config.micro_batch_size
    moved, reads = workload.trace.layers.moved * tokens / local / 3, tokens / max(length, min(local, SHORT_TOKENS))
    operations = workload.trace.layers.operations / 3 * max(1.0, reads)
    strided = workload.trace.layers.strided * tokens / local / 3
    seconds = flops / forward + products / machine.matmul_rate(shape.hidden)
    return seconds + machine.traffic_seconds(operations, moved, strided)


def _exchange(workload: Workload) -> float:
    """Seconds in which attention's tensors travel between the GPUs that share a row, in all layers.

    As if nothing hid them: on two H200s schemes that hide most of it (the ring, head chunks) lost about as much to
    kernels that had fewer processors beside the transfers.
    """
    costs, attention = workload.machine.costs, workload.usual_attention

    def seconds(traced: PassTrace) -> float:
        return traced.transferred / costs.exchange + costs.exchange_start / 2 * attention.exchanges

    return _over_layers(workload, seconds(attention.forward), seconds(attention.backward))


def _gradients(workload: Workload) -> float:
    """Seconds of summing float32 gradients over all GPUs, each twice past every GPU; sharded it is hidden.

    FSDP2 gathers and sums a layer's while another one computes; what the next step waits for is the first layer's.
    Replicas of the shards then sum their shares too.
    """
    trained, exchange = workload.parameters.trained, workload.machine.costs.exchange
    if workload.gpus == 1:
        return 0.0
    if workload.shard is None:
        return 2 * FLOAT * trained * (workload.gpus - 1) / workload.gpus / exchange
    replicas = workload.gpus // workload.shard
    own = 2 * FLOAT * trained / workload.shard * (replicas - 1) / replicas
    gathered = 2 * workload.dtype.itemsize * (trained + workload.parameters.frozen)
    return (gathered + FLOAT * trained + own) / workload.shape.layers / exchange


def shards_travel(workload: Workload) -> float:
    """Seconds in which each pass of a step gathers parameters and sums gradients beside its computation (FSDP2).

    A layer of experts has many parameters for the work that a token is to it: on short shares of a row it waits.
    """
    shard, parameters = workload.shard or 1, workload.parameters
    gathered = 2 if workload.config.parallel.reshard_after_forward else 1
    of_layers = workload.shape.layers * workload.layer_parameters * workload.dtype.itemsize
    of_layers -= (workload.dtype.itemsize - BYTES) * parameters.in_four_bits
    sent = workload.passes * (gathered * of_layers + FLOAT * parameters.trained)
    return sent * (shard - 1) / shard / workload.machine.costs.exchange


def _clipped(workload: Workload) -> float:
    """Bytes of clipping: the float32 gradients are read for their norm, and read and written to be scaled."""
    if not workload.config.optimizer.clip_norm:
        return 0.0
    return 3 * FLOAT * workload.parameters.trained / (workload.shard or 1)


def _copied_states(workload: Workload) -> float:
    """Bytes that FSDP2 reads and writes beside the exchange in a step.

    It casts a shard of float32 to what is computed in, takes what it gathered apart into parameters, and joins
    gradients as float32.
    """
    shard, size, parameters = workload.shard, workload.dtype.itemsize, workload.parameters
    if shard is None:
        return 0.0
    gathers = 2 if workload.config.parallel.reshard_after_forward else 1
    every = parameters.trained + parameters.frozen - parameters.in_four_bits
    cast = (FLOAT + size) / shard if size != FLOAT else 0.0
    taken_apart = 2 * size if shard > 1 else 0  # alone a process has its parameters by the cast
    return workload.passes * (gathers * (cast + taken_apart) * every + (size + FLOAT) * parameters.trained)


def checkpoint_costs(workload: Workload, seconds: float) -> tuple[int, float, float]:
    """A run's checkpoints: how many, the seconds that training waits for each, and the bytes of each.

    In the background it waits for the copy to the host alone. With `save_every: auto` steps longer than the shortest
    stop are saved each, where that takes no more than a twentieth of the time.
    """
    config = workload.config
    size = (FLOAT + STATE_BYTES[config.optimizer.state_precision]) * workload.parameters.trained
    copied = size / (workload.shard or 1) / min(workload.machine.link, COPIED)
    each = copied if config.async_checkpoints else copied + size / WRITTEN
    between = steps_between(config) or config.steps
    if config.save_every == "auto" and seconds > SHORTEST_STOP:
        between = min(between, math.ceil(each / DEAREST / seconds) or 1)
    return math.ceil(config.steps / between), each, size


def run_totals(workload: Workload, seconds: float, price: float | None) -> list[PlanLine]:
    """The whole run: hours, GPU-hours and, with a price for a GPU-hour, its cost."""
    config, basis = workload.config, workload.machine.basis
    saves, each, size = checkpoint_costs(workload, seconds)
    waited = f"waiting for {saves:,} checkpoints, {each:,.1f} s each"
    hours = (seconds * config.steps + saves * each) / 3600
    of_step = workload.step_tokens
    lines = [
        PlanLine("run", "tokens", config.steps * of_step / 1e6, "estimated", "million"),
        PlanLine("run", "time", hours, basis, "h"),
        PlanLine("run", waited, saves * each / 3600, "estimated", "h", False),
        PlanLine("run", f"disk for {config.keep + 1} checkpoints", (config.keep + 1) * size / GIB, "estimated", "GiB"),
        PlanLine("run", "GPU time", hours * workload.gpus, basis, "GPU-hours"),
        PlanLine("run", "tokens per second per GPU", of_step / seconds / workload.gpus, basis, "tokens/s"),
    ]
    if price is not None:
        lines.append(PlanLine("run", "cost, in the price's currency", hours * workload.gpus * price, "estimated", ""))
    return lines
