"""The one training loop: continued pretraining and SFT, on one process or many.

What a step does is in `step`; here is what surrounds the steps: the folder, resumption, log, checkpoints, the export.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import set_seed

from ultralong.checkpoints.saving.background import BackgroundSaver, background_saver
from ultralong.training import TrainResult, checkpoint, sharing
from ultralong.training.adapters.config import SETTINGS
from ultralong.training.adapters.export import ADAPTER, export_adapter
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.model import export, load_model
from ultralong.training.parallel import SPARE, Processes, grouped, launched, on_main
from ultralong.training.preflight import check_start
from ultralong.training.run_folder import RunFolder, stop_recorded
from ultralong.training.save_pace import SavePace
from ultralong.training.step import Run, build_run, reserve_host_memory, training_step
from ultralong.training.watch.full_disk import full_disk_named
from ultralong.training.watch.loss_spikes import RECENT
from ultralong.training.watch.trackers import scalars
from ultralong.utils.files import append_jsonl, locked, read_json, read_jsonl, write_json
from ultralong.utils.processes import stop_asked
from ultralong.utils.progress import hidden_bars, progress

FREE_SOME = "free some space, or set `keep` lower, then run again with --resume"
LOCK_SECONDS = 2.0  # a check of the folder holds its lock for a moment


def train(
    config: TrainConfig,
    resume: bool = False,
    quiet: bool = False,
    answers: bool = False,
    decide: sharing.Decide | None = None,
) -> TrainResult:
    """Train as `config` says; every process of the run calls it.

    Args:
        config: The run.
        resume: Resume from the newest checkpoint in `config.out`; start from step 0 if there is none.
        quiet: No progress bar.
        answers: Refuse rows of documents, where every token is a target (SFT).
        decide: Says how rows are shared where the config has auto; asked at the start of a run only.

    Returns:
        What was done. The trained model lies in `config.out/model`, trained LoRA adapters in `config.out/adapter`.

    Raises:
        ValueError: Settings that do not fit the rows, the model or the processes; a folder in use; a damaged
            checkpoint.
        FloatingPointError: The loss or the gradient became NaN or infinite; names step, rows and checkpoint.
    """
    start = time.perf_counter()
    with launched(config) as accelerator:
        config, decision = sharing.decided(config, accelerator, resume, decide)
        processes, folder = grouped(config, accelerator), RunFolder(Path(config.out))
        _check_together(config, resume, answers, processes)
        if resume and (result := on_main(lambda: _result_of(folder, config), accelerator)):
            if processes.is_main:
                _say_finished(folder, config)
            loss = math.nan if result["loss"] is None else result["loss"]
            return TrainResult(result["model"], result["steps"], result["tokens"], loss, time.perf_counter() - start)
        with _held(folder, processes), hidden_bars(quiet):
            return _train(config, folder, processes, resume, quiet, start, decision)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    processes: Processes,
    resume: bool,
    quiet: bool,
    start: float,
    decision: sharing.SharingDecision | None,
) -> TrainResult:
    """Train in a folder that this run holds."""
    order = RowOrder.of_run(config)
    step = on_main(lambda: folder.open(config, resume, order.content()), processes.accelerator)
    on_main(lambda: sharing.leave(folder, decision), processes.accelerator)
    if resume and step is None and processes.is_main:  # so that a slip in `out` is seen before hours have gone
        text = "holds no checkpoint to resume from: the run starts at its first step."
        print(f"note: {folder.path} {text}", file=sys.stderr)
    with stop_recorded(folder, processes.accelerator.num_processes):
        return _train_in(config, folder, processes, order, resume, quiet, start)


def _train_in(
    config: TrainConfig,
    folder: RunFolder,
    processes: Processes,
    order: RowOrder,
    resume: bool,
    quiet: bool,
    start: float,
) -> TrainResult:
    """Train in a folder that is ready."""
    set_seed(config.seed)
    model = load_model(config)
    run = build_run(config, processes, folder, order, model)
    first = 0
    if resume and (saved := folder.checkpoints()):
        first = checkpoint.restore(saved[-1][1], processes, run.model, run.optimizer)
        log = read_jsonl(folder.log)
        run.recent.extend(record["loss"] for record in log[-RECENT:])
        run.losses.extend(record["loss"] for record in log if record["step"] > _tail(config))
        read = first * config.global_batch_size * order.length  # where the log was removed
        run.tokens = log[-1].get("tokens", read) if log else read
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    watched = run.watch.over(folder.path, timeout.total_seconds())
    with stop_asked() as came, background_saver(config.async_checkpoints, timeout + SPARE) as background, watched:
        _steps(run, first, quiet, came, background)
    loss = sum(run.losses) / len(run.losses) if run.losses else None
    facts = {"steps": config.steps, "tokens": run.tokens, "loss": loss}
    weights = checkpoint.whole_weights(model)
    write = export_adapter if config.lora.on else export
    with full_disk_named(folder.path, FREE_SOME):
        made_in = result_folder(folder, config)
        on_main(lambda: write(model, weights, config, order, facts, made_in), processes.accelerator)
    made, seconds = str(result_folder(folder, config)), time.perf_counter() - start
    result = TrainResult(made, config.steps, run.tokens, loss or math.nan, seconds)
    if processes.is_main:
        write_json(folder.path / "result.json", {**facts, "model": result.model, "seconds": result.seconds})
    if config.trackers:
        processes.accelerator.end_training()
    return result


def result_folder(folder: RunFolder, config: TrainConfig) -> Path:
    """What a finished run leaves: the trained model, or the folder of its adapters."""
    return folder.path / ADAPTER if config.lora.on else folder.model


def _tail(config: TrainConfig) -> int:
    """Steps before the last tenth, whose mean loss is the run's."""
    return config.steps - max(1, config.steps // 10)


def _result_of(folder: RunFolder, config: TrainConfig) -> dict[str, Any] | None:
    """What a finished run recorded: `model`, `steps`, `tokens`, `loss`. None where anything of it is missing."""
    saved, record = folder.checkpoints(), folder.path / "result.json"
    place = result_folder(folder, config)
    kept = place / (SETTINGS if config.lora.on else "config.json")
    if not saved or saved[-1][0] != config.steps or not kept.is_file():
        return None
    try:
        found = read_json(record) if record.is_file() else None
    except ValueError:
        return None  # it is written again from the last checkpoint
    if not isinstance(found, dict) or found.get("steps") != config.steps or "tokens" not in found:
        return None
    return {"loss": None, **found, "model": str(place)}


def _say_finished(folder: RunFolder, config: TrainConfig) -> None:
    print(
        f"note: {folder.path} is finished: its {config.steps:,} steps are done and the "
        f"{'adapter' if config.lora.on else 'model'} is in {result_folder(folder, config)}. "
        f"Nothing was left to resume; to train on, start another run from {'the merged' if config.lora.on else 'that'} "
        "model.",
        file=sys.stderr,
    )


@contextmanager
def _held(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Hold the run's folder on the main process, so that no second run trains in it; a refusal reaches all."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(locked(folder.path, LOCK_SECONDS, by="`out`")), processes.accelerator)
        yield


def _check_together(config: TrainConfig, resume: bool, answers: bool, processes: Processes) -> None:
    """Check on the main process whether the run can start; a refusal reaches all."""
    world, device = processes.accelerator.num_processes, processes.accelerator.device.type
    on_main(lambda: check_start(config, world, resume=resume, answers=answers, device=device), processes.accelerator)


def _steps(run: Run, first: int, quiet: bool, came: list[int], background: BackgroundSaver | None) -> None:
    """The steps after `first`. When a stop signal came to any process, all save after the step and leave.

    Raises:
        SystemExit: With 128 and the signal's number, as if the signal had ended the process.
    """
    config, saved, pace = run.config, first, SavePace(run.config, run.processes)
    hidden = quiet or not run.processes.is_main
    with progress(total=config.steps, initial=first, desc="train", unit="step", quiet=hidden) as bar:
        for step in range(first, config.steps):
            record = _logged_step(run, step)
            if background is not None and step == first:  # which has made the optimizer's states
                background.reserve(checkpoint.states_to_save(run.model, run.optimizer))
            if step == first + 1 and run.processes.is_main:  # the first one may compile
                pace.tell(record["seconds"])
            bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s", refresh=False)
            bar.update()
            stop, due = _asked(run, came, background), pace.due(step + 1, record["seconds"])
            if stop or due:
                run.watch.position.at("saving a checkpoint", patience=4)  # disks may be slow
                begin = time.perf_counter()
                _save(run, step + 1, background, wait=bool(stop) or step + 1 == config.steps)
                pace.saved(time.perf_counter() - begin)
                saved = step + 1
                stop = stop or _asked(run, came, background)  # one that came while this was saved needs no other step
            if stop and saved < config.steps:
                if background is not None:
                    with full_disk_named(run.folder.path, FREE_SOME):
                        background.wait()
                _leave(run, stop, saved)
    assert saved == config.steps or first == config.steps


def _save(run: Run, step: int, background: BackgroundSaver | None, wait: bool) -> None:
    """Write a checkpoint; in the background where there is one, unless it has to be there before what follows."""
    run.folder.check_there()
    with full_disk_named(run.folder.path, FREE_SOME):
        if background is None or wait:
            run.memory.release()  # saving copies parameters and states to the host
        optimizer, keep, rows = run.optimizer, run.config.keep, run.order.content()
        checkpoint.save(run.folder, run.processes, run.model, optimizer, step, keep, background, rows)
        if background is not None and wait:
            background.wait()


def _logged_step(run: Run, step: int) -> dict[str, Any]:
    """One step, and its record in the log and the trackers."""
    reserve_host_memory(run)
    begin = time.perf_counter()
    record = training_step(run, step)
    record["seconds"] = round(time.perf_counter() - begin, 4)
    tokens = record.pop("step_tokens")
    run.tokens += tokens
    record |= run.watch.report(step + 1, record["seconds"])
    record |= run.throughput.metrics(record["seconds"], tokens, record.pop("pairs"))
    if step >= _tail(run.config):
        run.losses.append(record["loss"])
    logged = {"tokens": run.tokens, **record}
    if run.processes.is_main:
        run.folder.check_there()
        append_jsonl(run.folder.log, {"step": step + 1, **logged})
    if run.config.trackers:
        run.processes.accelerator.log(scalars(logged), step=step + 1)
    return record


def _asked(run: Run, came: list[int], background: BackgroundSaver | None) -> int:
    """The number of a signal that asked any of the processes to stop, the same on all of them; 0 for none.

    Raises:
        BaseException: A checkpoint could not be written in the background; it is raised on all processes.
    """
    failed = background is not None and background.failed
    number, failures = run.processes.largest(came[0] if came else 0, failed)
    if failures and background is not None:
        with full_disk_named(run.folder.path, FREE_SOME):
            background.wait()
    return int(number)


def _leave(run: Run, number: int, step: int) -> NoReturn:
    """End a run that was asked to stop and has saved its last step."""
    for tracker in run.processes.accelerator.trackers:
        tracker.finish()
    if run.processes.is_main:
        print(
            f"note: stopped by {signal.Signals(number).name} after step {step:,}, which is saved in "
            f"{run.folder.checkpoint(step)}. Run again with --resume.",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)
