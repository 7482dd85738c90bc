"""One optimizer step of the loop, and what all steps of a run share.

A step sums the losses of all its rows' targets over processes and micro-batches, divides by the number of those
targets, and updates once. DistributedDataParallel and FSDP2 average gradients over all W processes, so each process
scales its own sum by W / targets; the result does not depend on how many shared the work.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ultralong.attention import make_attention_context
from ultralong.attention.collectives import waiting
from ultralong.checkpoints.config import head_counts
from ultralong.data.rows.packed_rows import IGNORE
from ultralong.data.rows.row_checks import anchor_token
from ultralong.data.rows.short_contexts import equal_lengths, short_contexts
from ultralong.rope.tables import text_lengths
from ultralong.training.batches import Batch, RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.loss import LanguageModelLoss
from ultralong.training.memory.activation_memory import ActivationMemory, decoder_layers
from ultralong.training.model import make_optimizer, set_lr
from ultralong.training.parallel import Processes, full_tensor, shard_parameters
from ultralong.training.run_folder import RunFolder
from ultralong.training.throughput import Throughput
from ultralong.training.watch.loss_spikes import RECENT, check_loss, stop_run
from ultralong.training.watch.ranks import RankWatch

SHORT_TOKENS = 16384  # of short contexts that are read in one pass, where a share of a row is as long


@dataclass
class Run:
    """What the steps of one run share."""

    config: TrainConfig
    processes: Processes
    folder: RunFolder
    order: RowOrder
    model: nn.Module
    optimizer: torch.optim.Optimizer
    heads: tuple[int, int]
    memory: ActivationMemory
    throughput: Throughput
    watch: RankWatch
    tokens: int = 0  # of all steps so far
    losses: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def dynamic(self) -> bool:
        """Whether each row is shared by as many processes as its work asks for."""
        return self.config.parallel.dynamic


def build_run(
    config: TrainConfig, processes: Processes, folder: RunFolder, order: RowOrder, model: PreTrainedModel
) -> Run:
    """Wrap a model and make its optimizer as the config says; nothing is read from or written to the folder."""
    if config.compile and (processes.accelerator.num_processes > 1 or order.mask_documents):
        raise ValueError("compile works on one process with rows that have no document mask; switch one of them off.")
    order.anchor = anchor_token(order.folders, model.config.get_text_config()) if config.anchor else None
    loss, memory = LanguageModelLoss(model, config.memory.loss_tile), ActivationMemory(model, config.memory)
    throughput = Throughput.from_model(model, processes.accelerator.device, processes.accelerator.num_processes)
    if config.compile:
        model.get_decoder().compile(dynamic=False)
    if processes.mesh is None:
        optimizer = make_optimizer(loss, config.optimizer)
        loss, optimizer = processes.accelerator.prepare(loss, optimizer)
    else:
        shard_parameters(loss, decoder_layers(model), processes, config)
        optimizer = make_optimizer(loss, config.optimizer)
    if config.trackers:
        processes.accelerator.init_trackers("ultralong")
    return Run(
        config,
        processes,
        folder,
        order,
        loss,
        optimizer,
        head_counts(model.config),
        memory,
        throughput,
        RankWatch(processes, loss),
    )


def reserve_host_memory(run: Run) -> None:
    """Allocate the host buffers of the memory plan, if they are not there."""
    config, order = run.config, run.order
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    residual = torch.float32 if run.processes.mesh is None else dtype  # autocast leaves float32 between layers
    rows = 1 if order.end_to_end else config.micro_batch_size
    whole = order.most_pack_tokens(config) if run.dynamic else order.length * config.micro_batch_size
    local_tokens = -(-whole // rows // run.processes.context_parallel_size)
    run.memory.reserve(rows, local_tokens, dtype, residual, run.processes.accelerator.device)


def _step_batches(run: Run, step: int) -> tuple[list[Batch], int]:
    """This process's batches of a step, one for each pass, and the tokens of the whole step."""
    config, processes, order = run.config, run.processes, run.order
    rows, groups = config.global_batch_size, processes.data_ranks
    if run.dynamic:
        packs = order.packs(step * rows, rows, groups, order.most_pack_tokens(config), run.throughput.token_work)
        return [order.pack(each[processes.data_rank]) for each in packs.passes], packs.tokens
    mine, micro = rows // groups, config.micro_batch_size
    start = step * rows + processes.data_rank * mine
    return [order.batch(start + i, micro) for i in range(0, mine, micro)], rows * order.length


def _targets_and_pairs(run: Run, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Targets of a whole step, and pairs of tokens of which one attends to the other."""
    processes, pairs_of = run.processes, run.throughput.pairs
    targets = float(sum((batch.labels != IGNORE).sum() for batch in batches))
    if run.order.end_to_end:
        pairs = sum(pairs_of(batch.input_ids.numel(), batch.boundaries) for batch in batches)
    else:
        pairs = sum(len(batch.places) for batch in batches) * pairs_of(run.order.length, None)
    device = processes.accelerator.device
    counts = (torch.tensor(targets, device=device), torch.tensor(pairs, dtype=torch.float64, device=device))
    # Each row was counted by all processes that share it.
    of_targets, of_pairs = (processes.all_reduce_sum(count) / processes.context_parallel_size for count in counts)
    return of_targets, of_pairs


def training_step(run: Run, step: int) -> dict[str, Any]:
    """One optimizer step; returns what the log keeps of it."""
    config, processes = run.config, run.processes
    run.watch.begin(step + 1)
    batches, tokens = _step_batches(run, step)
    run.watch.position.at("counting targets")
    targets, pairs = _targets_and_pairs(run, batches)
    scale = processes.accelerator.num_processes / targets.clamp(min=1)
    sums = torch.zeros(2, config.position_buckets, dtype=torch.float64, device=processes.accelerator.device)
    weighted = sums.new_zeros(())
    shared: list[int] = []  # for each of this group's rows by how many processes
    for number, batch in enumerate(batches):
        run.watch.position.at(f"pass {number + 1} of {len(batches)}")
        with processes.micro_batch(run.model, last=number == len(batches) - 1):
            total, losses, bucket, counted = _forward(run, batch, shared)
            (total * scale).backward()
        weighted += total.detach()
        sums[0].scatter_add_(0, bucket, losses)
        sums[1].scatter_add_(0, bucket, counted)
    run.watch.gradients.ended()
    sums = processes.all_reduce_sum(sums)
    loss = float(sums[0].sum() / sums[1].sum().clamp(min=1))
    check_loss(run, step, loss, batches)
    run.watch.position.at("update")
    norm = _update(run, step)
    if not math.isfinite(norm):
        stop_run(run, step, f"the gradient's norm is {norm}", batches)
    run.recent.append(loss)
    by_position = (sums[0] / sums[1]).tolist()
    long_ce = (
        {"long_ce": round(float(processes.all_reduce_sum(weighted) / targets.clamp(min=1)), 6)}
        if config.long_ce.weight_cap
        else {}
    )
    return {
        "loss": round(loss, 6),
        "grad_norm": round(norm, 6),
        "lr": float(run.optimizer.param_groups[0]["lr"]),
        "targets": int(targets),
        "pairs": float(pairs),
        **long_ce,
        "step_tokens": tokens,
        **(_degrees(run, len(batches), shared) if run.dynamic else {}),
        "loss_by_position": [round(x, 4) if math.isfinite(x) else None for x in by_position],
    }


def _degrees(run: Run, passes: int, shared: list[int]) -> dict[str, Any]:
    """For the log: passes of a step, and how many of its rows were shared by 1, 2, 4 ... processes."""
    size = run.processes.context_parallel_size
    counts = torch.bincount(torch.tensor(shared, dtype=torch.int64), minlength=size + 1)
    counts = run.processes.all_reduce_sum(counts.to(run.processes.accelerator.device)) // size
    return {"passes": passes, "rows_by_degree": {str(d): n for d, n in enumerate(counts.tolist()) if n}}


def _forward(run: Run, batch: Batch, shared_by: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This process's part of one batch: sum of losses with its graph, and per token: loss, bucket, counted or not.

    The number of processes that hold each row of a pack is added to `shared_by`.
    """
    device, buckets = run.processes.accelerator.device, run.config.position_buckets
    tensors = {
        name: getattr(batch, name).to(device, non_blocking=True) for name in ("input_ids", "labels", "position_ids")
    }
    tensors["bucket"] = batch.position_buckets(buckets).to(device, non_blocking=True)
    extra: dict[str, Any] = {}
    if run.config.long_ce.weight_cap:
        tensors["short_losses"] = _short_losses(run, batch)
    run.memory.clear()
    shared = run.processes.context_parallel_size > 1
    # Without a context transformers makes the mask, and takes a jump of the positions for another text's start.
    if shared or batch.skips or batch.boundaries is not None or run.memory.attention_store is not None:
        context = make_attention_context(
            batch.input_ids.shape[1],
            run.processes.context_parallel_group,
            run.config.parallel.scheme,
            run.config.parallel.kernel,
            boundaries=batch.boundaries,
            heads=run.heads[0],
            kv_heads=run.heads[1],
            head_chunks=run.config.parallel.head_chunks,
            store=run.memory.attention_store,
            anchors=batch.anchors,
        )
        positions = tensors["position_ids"]
        last = positions[:, -1:].expand_as(positions)
        tensors["text_lengths"] = last + 1 if batch.skips else text_lengths(positions)
        padding = {"labels": IGNORE, "text_lengths": 1}  # 0 for all others
        tensors = {name: context.shard(tensor, dim=1, pad=padding.get(name, 0)) for name, tensor in tensors.items()}
        extra = {"attention_context": context}
        if run.dynamic and batch.places:
            shared_by += context.row_degrees([kept for kept, _ in batch.rows])
    if run.config.long_ce.weight_cap:
        extra["weight_cap"] = run.config.long_ce.weight_cap
    bucket, labels = tensors.pop("bucket"), tensors["labels"]
    total, losses = run.model(**tensors, **extra)
    return total, losses.double().flatten(), bucket.flatten(), (labels != IGNORE).double().flatten()


@torch.no_grad()
def _short_losses(run: Run, batch: Batch) -> Tensor:
    """Losses (B, T) of a batch's targets with a short context, NaN where there is none, on all who share the rows.

    The processes that share a row deal its short contexts out. All processes make as many passes: under FSDP2 each pass
    gathers parameters from all of them.
    """
    config, processes, device = run.config, run.processes, run.processes.accelerator.device
    model = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
    size, labels = processes.context_parallel_size, batch.labels.numpy()
    boundaries = None if batch.boundaries is None else batch.boundaries.tolist()
    contexts = short_contexts(labels, boundaries, config.long_ce.short_context, config.long_ce.stride)
    most = min(SHORT_TOKENS, labels.size // size)  # a pass is no larger than the long one, if one context is not
    mine = list(equal_lengths(contexts, most))[processes.accelerator.process_index % size :: size]
    (passes,) = processes.largest(len(mine))
    found = torch.zeros(2, *labels.shape, device=device)  # losses, and whether there is one
    for number in range(int(passes)):
        if number >= len(mine):
            _read_short(run, model, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE))
            continue
        ids, wanted = (
            torch.stack([x[context.row, context.start : context.end] for context in mine[number]])
            for x in (batch.input_ids, batch.labels)
        )
        wanted = wanted.where(torch.arange(ids.shape[1]) >= mine[number][0].first - mine[number][0].start, IGNORE)
        for context, losses in zip(mine[number], _read_short(run, model, ids, wanted), strict=True):
            found[0, context.row, context.first : context.end] = losses[context.first - context.start :]
            found[1, context.row, context.first : context.end] = 1
    if processes.context_parallel_group is not None:
        with waiting("losses with short contexts"):
            dist.all_reduce(found, group=processes.context_parallel_group)
    return found[0].masked_fill_(found[1] == 0, np.nan)


def _read_short(run: Run, model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Losses (B, t) of texts of one length, each by itself and on this process alone."""
    tokens, device = ids.shape[1], run.processes.accelerator.device
    context = make_attention_context(
        tokens, kernel=run.config.parallel.kernel, heads=run.heads[0], kv_heads=run.heads[1]
    )
    _, losses = model(
        ids.to(device),
        labels.to(device),
        torch.full_like(ids, tokens, device=device),
        position_ids=torch.arange(tokens, device=device).expand_as(ids),
        attention_context=context,
    )
    return losses


def _update(run: Run, step: int) -> float:
    """Clip, set the learning rate, update; returns the gradient norm before clipping."""
    config = run.config.optimizer
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm or math.inf)
    for group in run.optimizer.param_groups:
        set_lr(group, config.lr * config.factor(step, run.config.steps))
    if math.isfinite(value := float(full_tensor(norm))):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return value
