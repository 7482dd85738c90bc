"""The one training loop: continued pretraining and SFT, on one process or many.

What a step does is in `ultralong.training.step`; here is what surrounds the steps: the folder, resumption, the log,
checkpoints and the exported model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from ultralong.training import checkpoint
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.model import export, load_model
from ultralong.training.parallel import Processes, connect
from ultralong.training.preflight import check_start
from ultralong.training.step import RECENT, Run, build_run, reserve_host_memory, training_step
from ultralong.utils.files import append_jsonl, read_jsonl, write_json
from ultralong.utils.progress import progress


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


def train(config: TrainConfig, resume: bool = False, quiet: bool = False, answers: bool = False) -> TrainResult:
    """Train as `config` says; every process of the run calls it.

    Args:
        config: The run.
        resume: Resume from the newest checkpoint in `config.out`; start anew if there is none.
        quiet: No progress bar.
        answers: Refuse rows of documents, where every token is a target (SFT).

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
        _check_together(config, resume, answers, processes)
        order = RowOrder(config.data, config.seed, config.steps * config.global_batch_size, config.length)
        _prepare_folder(folder, config, resume, processes)
        set_seed(config.seed)
        model = load_model(config)
        run = build_run(config, processes, folder, order, model)
        first = 0
        if resume and (saved := folder.checkpoints()):
            first = checkpoint.restore(saved[-1][1], processes, run.model, run.optimizer)
            run.recent.extend(record["loss"] for record in read_jsonl(folder.log)[-RECENT:])
        _steps(run, first, quiet)
        tokens = config.steps * config.global_batch_size * order.length
        loss = sum(run.losses) / len(run.losses) if run.losses else None
        facts = {"steps": config.steps, "tokens": tokens, "loss": loss}
        weights = checkpoint.whole_weights(model)
        if processes.is_main:
            export(model, weights, config, order, facts, folder.model)
        processes.barrier()
        result = TrainResult(str(folder.model), config.steps, tokens, loss or math.nan, time.perf_counter() - start)
        if processes.is_main:
            write_json(folder.path / "result.json", {**facts, "model": result.model, "seconds": result.seconds})
        if config.trackers:
            processes.accelerator.end_training()
        return result


def _check_together(config: TrainConfig, resume: bool, answers: bool, processes: Processes) -> None:
    """Check on the main process whether the run can start; a refusal reaches all."""
    world, device = processes.accelerator.num_processes, processes.accelerator.device.type
    _on_main(lambda: check_start(config, world, resume=resume, answers=answers, device=device), processes)


def _prepare_folder(folder: checkpoint.RunFolder, config: TrainConfig, resume: bool, processes: Processes) -> None:
    """Open the folder on the main process; a refusal reaches all."""
    _on_main(lambda: folder.open(config, resume), processes)


def _on_main(work: Callable[[], object], processes: Processes) -> None:
    """Do something on the main process; its ValueError is raised on all, so that none waits for the others for ever."""
    error: list[str] = [""]
    if processes.is_main:
        try:
            work()
        except ValueError as refused:
            error = [str(refused)]
    if processes.accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(error)
    if error[0]:
        raise ValueError(error[0])


def _steps(run: Run, first: int, quiet: bool) -> None:
    config = run.config
    bar = progress(
        total=config.steps, initial=first, desc="train", unit="step", quiet=quiet or not run.processes.is_main
    )
    saved = first
    for step in range(first, config.steps):
        reserve_host_memory(run)
        begin = time.perf_counter()
        record = training_step(run, step)
        record["seconds"] = round(time.perf_counter() - begin, 4)
        tokens = config.global_batch_size * run.order.length
        record |= run.throughput.metrics(record["seconds"], tokens, record.pop("pairs"))
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
