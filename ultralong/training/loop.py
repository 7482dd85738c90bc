"""The one training loop: continued pretraining and SFT, on one process or many.

A step takes `rows_per_step` packed rows, sums the losses of all their targets over processes and micro-batches, divides
by the number of those targets, and updates once. DistributedDataParallel and FSDP2 average gradients over all W
processes, so each process scales its own sum by W / targets; the result does not depend on how many shared the work.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultralong.attention import make_context
from ultralong.files import append_jsonl, write_json
from ultralong.progress import progress
from ultralong.training import checkpoint
from ultralong.training.batches import Batch, RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.export import export
from ultralong.training.loss import LanguageModelLoss
from ultralong.training.memory import Memory, decoder_layers
from ultralong.training.model import check_model, head_counts, load_model, make_optimizer, set_lr
from ultralong.training.parallel import Processes, connect, shard_parameters, whole


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        model: The trained model, a plain Hugging Face folder.
        steps: Optimizer steps of the whole run, those before a resumption included.
        tokens: Tokens (inputs) of the whole run.
        loss: Mean loss per target over the last tenth of the steps, in nats.
        seconds: Wall time of this call, start-up and saving included.
    """

    model: str
    steps: int
    tokens: int
    loss: float
    seconds: float


@dataclass
class Run:
    """What the steps of one run share."""

    config: TrainConfig
    processes: Processes
    folder: checkpoint.RunFolder
    order: RowOrder
    model: nn.Module
    optimizer: torch.optim.Optimizer
    heads: tuple[int, int]
    memory: Memory
    losses: list[float] = field(default_factory=list)


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> TrainResult:
    """Train as `config` says; every process of the run calls it.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint in `config.out`; start anew if there is none.
        quiet: No progress bar.

    Returns:
        What was done. The trained model lies in `config.out/model`.

    Raises:
        ValueError: Settings that do not fit the rows, the model or the processes; a folder in use; a damaged
            checkpoint.
        FloatingPointError: The loss or the gradient became NaN or infinite; names step, rows and checkpoint.
    """
    start = time.perf_counter()
    with connect(config) as processes:
        folder = checkpoint.RunFolder(Path(config.out))
        order = RowOrder(config.data, config.seed, config.steps * config.rows_per_step)
        _prepare_folder(folder, config, resume, processes)
        set_seed(config.seed)
        model = load_model(config)
        check_model(model, order)
        run = assemble(config, processes, folder, order, model)
        first = 0
        if resume and (saved := folder.checkpoints()):
            first = checkpoint.restore(saved[-1][1], processes, run.model, run.optimizer)
        _steps(run, first, quiet)
        facts = {
            "steps": config.steps,
            "tokens": config.steps * config.rows_per_step * order.length,
            "loss": sum(run.losses) / len(run.losses) if run.losses else None,
        }
        weights = checkpoint.whole_weights(model)
        if processes.is_main:
            export(model, weights, config, order, facts, folder.model)
        processes.wait()
        result = TrainResult(
            str(folder.model), config.steps, facts["tokens"], facts["loss"] or math.nan, time.perf_counter() - start
        )
        if processes.is_main:
            write_json(folder.path / "result.json", {**facts, "model": result.model, "seconds": result.seconds})
        if config.trackers:
            processes.accelerator.end_training()
        return result


def _prepare_folder(folder: checkpoint.RunFolder, config: TrainConfig, resume: bool, processes: Processes) -> None:
    """Open the folder on the main process; a refusal reaches all, so that none waits for the others for ever."""
    error: list[str] = [""]
    if processes.is_main:
        try:
            folder.open(config, resume)
        except ValueError as refused:
            error = [str(refused)]
    if processes.accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(error)
    if error[0]:
        raise ValueError(error[0])


def assemble(
    config: TrainConfig, processes: Processes, folder: checkpoint.RunFolder, order: RowOrder, model: PreTrainedModel
) -> Run:
    """Wrap a model and make its optimizer as the config says; nothing is read from or written to the folder."""
    if config.compile and (processes.accelerator.num_processes > 1 or order.mask_documents):
        raise ValueError("compile works on one process with rows that have no document mask; switch one of them off.")
    loss, memory = LanguageModelLoss(model, config.memory.loss_tile), Memory(model, config.memory)
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
    return Run(config, processes, folder, order, loss, optimizer, head_counts(model), memory)


def reserve_host_memory(run: Run) -> None:
    """Make the host buffers of the memory plan, if they are not there."""
    config, order = run.config, run.order
    wide = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    stream = torch.float32 if run.processes.mesh is None else wide  # autocast leaves float32 between layers
    rows = 1 if order.mask_documents else config.rows_at_once  # under a mask rows lie end to end
    share = -(-order.length * config.rows_at_once // rows // run.processes.sequence)
    run.memory.reserve(rows, share, wide, stream, run.processes.accelerator.device)


def _steps(run: Run, first: int, quiet: bool) -> None:
    config = run.config
    bar = progress(
        total=config.steps, initial=first, desc="train", unit="step", quiet=quiet or not run.processes.is_main
    )
    saved = first
    for step in range(first, config.steps):
        reserve_host_memory(run)
        begin = time.perf_counter()
        record = take_step(run, step)
        record["seconds"] = round(time.perf_counter() - begin, 4)
        tokens = config.rows_per_step * run.order.length
        record["tokens_per_second"] = round(tokens / record["seconds"], 1)
        if step >= config.steps - max(1, config.steps // 10):
            run.losses.append(record["loss"])
        if run.processes.is_main:
            append_jsonl(run.folder.log, {"step": step + 1, "tokens": (step + 1) * tokens, **record})
        if config.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, float | int)}
            run.processes.accelerator.log(numbers, step=step + 1)
        bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s", refresh=False)
        bar.update()
        if step + 1 == config.steps or (config.save_every and (step + 1) % config.save_every == 0):
            run.memory.release()  # saving copies parameters and states to the host
            checkpoint.save(run.folder, run.processes, run.model, run.optimizer, step + 1, config.keep)
            saved = step + 1
    bar.close()
    assert saved == config.steps or first == config.steps


def take_step(run: Run, step: int) -> dict[str, Any]:
    """One optimizer step; returns what the log keeps of it."""
    config, processes = run.config, run.processes
    mine = config.rows_per_step // processes.data_ranks
    start = step * config.rows_per_step + processes.data_rank * mine
    batches = [run.order.batch(start + i, config.rows_at_once) for i in range(0, mine, config.rows_at_once)]
    targets = torch.tensor(
        float(sum((batch.labels != -100).sum() for batch in batches)), device=processes.accelerator.device
    )
    targets = processes.total(targets) / processes.sequence  # each row was counted by all processes that share it
    scale = processes.accelerator.num_processes / targets.clamp(min=1)
    sums = torch.zeros(2, config.position_buckets, dtype=torch.float64, device=processes.accelerator.device)
    for number, batch in enumerate(batches):
        total, losses, bucket, counted = _forward(run, batch)
        processes.backward(total * scale, run.model, last=number == len(batches) - 1)
        sums[0].scatter_add_(0, bucket, losses)
        sums[1].scatter_add_(0, bucket, counted)
    norm = _update(run, step)
    sums = processes.total(sums)
    loss = float(sums[0].sum() / sums[1].sum().clamp(min=1))
    _check_finite(run, step, loss, norm, batches)
    by_position = (sums[0] / sums[1]).tolist()
    return {
        "loss": round(loss, 6),
        "grad_norm": round(norm, 6),
        "lr": float(run.optimizer.param_groups[0]["lr"]),
        "targets": int(targets),
        "loss_by_position": [round(x, 4) if math.isfinite(x) else None for x in by_position],
    }


def _forward(run: Run, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This process's share of one batch: sum of losses with its graph, and per token: loss, bucket, counted or not."""
    device, buckets = run.processes.accelerator.device, run.config.position_buckets
    tensors = {
        name: getattr(batch, name).to(device, non_blocking=True) for name in ("input_ids", "labels", "position_ids")
    }
    place = torch.arange(batch.input_ids.shape[1], device=device) % batch.row_length  # (T,)
    tensors["bucket"] = (place * buckets // batch.row_length).expand_as(batch.input_ids)
    extra = {}
    run.memory.clear()
    if run.processes.sequence > 1 or batch.boundaries is not None or run.memory.keeper is not None:
        context = make_context(
            batch.input_ids.shape[1],
            run.processes.group,
            run.config.parallel.scheme,
            run.config.parallel.kernel,
            boundaries=batch.boundaries,
            heads=run.heads[0],
            kv_heads=run.heads[1],
            stages=run.config.parallel.stages,
            keeper=run.memory.keeper,
        )
        padding = {"input_ids": 0, "labels": -100, "position_ids": 0, "bucket": 0}
        tensors = {name: context.shard(tensor, dim=1, pad=padding[name]) for name, tensor in tensors.items()}
        extra = {"attention_context": context}
    bucket, labels = tensors.pop("bucket"), tensors["labels"]
    total, losses = run.model(**tensors, **extra)
    return total, losses.double().flatten(), bucket.flatten(), (labels != -100).double().flatten()


def _update(run: Run, step: int) -> float:
    """Clip, set the learning rate, update; returns the gradient norm before clipping."""
    config = run.config.optimizer
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm or math.inf)
    for group in run.optimizer.param_groups:
        set_lr(group, config.lr * config.factor(step, run.config.steps))
    if math.isfinite(value := float(whole(norm))):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return value


def _check_finite(run: Run, step: int, loss: float, norm: float, batches: list[Batch]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    rows = "; ".join(run.order.describe(place) for batch in batches for place in batch.places[:4])
    saved = run.folder.checkpoints()
    last = f"The last good checkpoint is {saved[-1][1]}." if saved else "There is no checkpoint yet."
    raise FloatingPointError(
        f"Step {step + 1}: loss {loss}, gradient norm {norm}. No update was made. Rows on this process: {rows}. {last} "
        "Lower the learning rate, or look at those rows."
    )
