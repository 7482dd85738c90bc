"""Seconds of one configuration of the trainer, item by item, and what the whole run takes."""

from __future__ import annotations

from ultralong.planner.report import Line
from ultralong.planner.workload import FLOAT, Job, layer_parameters

# What the tiled loss moves beside its products: each logit for the log-sum-exp (read twice) and for the gradient (read,
# and written in two bytes), and for each tile the head's gradient, float32, which the tile's own is added to.
LOSS_BYTES_A_LOGIT = 14
LOSS_BYTES_A_WEIGHT = 12
LOSS_OPERATIONS = 12  # of a tile


def step_lines(job: Job) -> list[Line]:
    """Seconds of one optimizer step."""
    machine, shape = job.machine, job.shape
    passes = job.passes * job.config.micro_batch_size
    forward, backward = _attention(job)
    again = forward * _again(job)
    head = 6.0 * job.share * shape.hidden * shape.vocabulary / machine.matmul_rate(shape.hidden)
    tiles = -(-job.share // job.config.memory.loss_tile)
    moved = (LOSS_BYTES_A_LOGIT * job.share + LOSS_BYTES_A_WEIGHT * tiles * shape.hidden) * shape.vocabulary
    head += machine.traffic_seconds(LOSS_OPERATIONS * tiles, moved)
    # The trace is of a whole micro-batch, whatever its rows.
    matmul = job.trace.multiplied / machine.matmul_rate(shape.hidden) * job.passes
    other = machine.traffic_seconds(job.trace.operations, job.trace.moved) * job.passes
    items = {
        "attention, forward": forward * passes,
        "attention, computed again": again * passes,
        "attention, backward": backward * passes,
        "matrix products of the decoder": matmul,
        "layer inputs made again": _made_again(job) * passes,
        "head and loss": head * passes,
        "all else (memory traffic)": other,
        "exchange between GPUs": _exchange(job) * passes,
        "sum of gradients over GPUs": _gradients(job),
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
    return (1 - (kept + moved) / job.shape.layers) if job.config.memory.activation_checkpointing else 0.0


def _made_again(job: Job) -> float:
    """Seconds of making the inputs that were not kept: what follows attention in every layer but a group's last."""
    shape = job.shape
    projections = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim  # of q, k and v: before attention
    layer = layer_parameters(job) - projections
    return (shape.layers - job.inputs) * 2.0 * layer * job.share / job.machine.matmul_rate(shape.hidden)


def _attention(job: Job) -> tuple[float, float]:
    """Seconds of one row's attention on one GPU, forward and backward, in all layers."""
    rates = job.machine.attention_rates(job.config.parallel.kernel, job.shape.head_dim, job.tokens)
    work = 2.0 * job.tokens**2 * job.shape.heads * job.shape.head_dim * job.shape.layers / job.sequence
    return work / rates[0], 2.5 * work / rates[1]


def _exchange(job: Job) -> float:
    """Seconds in which a row's tokens are traded for heads and back, or its keys gathered, in all layers."""
    if job.sequence == 1:
        return 0.0
    wide, narrow = (count * job.shape.head_dim for count in (job.shape.heads, job.shape.kv_heads))
    forward = 2 * wide + 2 * narrow  # q, k, v there, out back
    backward = 4 * wide + 4 * narrow  # q, k, v, out and its gradient there, three gradients back
    if job.gathered:  # of the other ranks' k and v; their gradients go back in float32
        forward = 2 * narrow * job.sequence
        backward = forward + 2 * forward
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
    tokens = job.config.steps * job.config.global_batch_size * job.tokens
    lines = [
        Line("run", "tokens", tokens / 1e6, "estimated", "million"),
        Line("run", "time", hours, basis, "h"),
        Line("run", "GPU time", hours * job.gpus, basis, "GPU-hours"),
        Line(
            "run",
            "tokens a second and GPU",
            job.config.global_batch_size * job.tokens / seconds / job.gpus,
            basis,
            "tokens/s",
        ),
    ]
    if price is not None:
        lines.append(Line("run", "cost, in the price's currency", hours * job.gpus * price, "estimated", ""))
    return lines
