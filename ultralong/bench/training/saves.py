"""What checkpoints cost a training: `ultralong bench saves MODEL --tokens N --gpus 2 --sharded`.

One run makes steps without a checkpoint, then steps while a checkpoint is written in the background
(`async_checkpoints`), then steps without one again, and last a checkpoint that it waits for. What a background save
costs is the time of its copy to the host, and what the steps beside its writing take longer than the others' median.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ultralong.bench.training.case import RowCount, TrainingCase
from ultralong.bench.training.measure import case_config, facts_beside, kept, start_ranks, train_config
from ultralong.bench.training.work import prepare_training, warmed_up
from ultralong.checkpoints.background import BackgroundSaver, background_saver
from ultralong.planner.shapes import shape_of
from ultralong.training import checkpoint
from ultralong.training.config import TrainConfig
from ultralong.training.parallel import connect
from ultralong.training.step import Run, training_step
from ultralong.utils import settings
from ultralong.utils.files import read_json, write_json
from ultralong.utils.units import GIB

MOST_STEPS = 50  # beside one write: a disk so slow is not waited for with steps


def measure_saves(case: TrainingCase, saves: int, folder: Path | None = None) -> dict[str, Any]:
    """Time a case's steps with and without checkpoints.

    Args:
        case: What to train; its `steps` are those without a checkpoint, before and after, and the fewest beside each.
        saves: Background checkpoints that are timed, after a first one that allocates memory for its copy.
        folder: Where models and rows are kept for the next case, and checkpoints are written: its disk is measured.

    Returns:
        A row with `seconds_per_step` (median, without a checkpoint), `spread` (slowest of those against it),
        `checkpoint_gib`, and per background save `copy_seconds`, `write_seconds`, `steps_beside` and `slower_seconds`;
        `cost_seconds` (median of copy and slower together), `cost_of_a_step` (its share), and `waited_seconds` of a
        checkpoint that is waited for. Or `note`, where the run failed.
    """
    row = {"model": case.name, "parameters": shape_of(case_config(case)).parameters, "tokens": case.tokens}
    row |= {"gpus": case.gpus, "sharded": case.sharded, "state_precision": case.state_precision}
    facts = facts_beside()
    row |= {"gpu": facts["device"], "date": facts["date"], "versions": facts["packages"]}
    with kept(folder) as place:
        made = prepare_training(place, case.model, case.layers, [case.tokens])
        with tempfile.TemporaryDirectory(dir=place) as run:
            settings.save(train_config(case, made, Path(run), (RowCount(case.tokens, 1),)), Path(run) / "config.yaml")
            if failed := start_ranks(case.gpus, "ultralong.bench.training.saves", run, made["short"], str(saves)):
                return row | failed
            return row | read_json(Path(run) / "saves.json")


def work(folder: Path, short: str, saves: int) -> None:
    """What each process runs; the first one writes `folder/saves.json`."""
    config = settings.load(TrainConfig, folder / "config.yaml")
    with connect(config) as processes, background_saver(True, timedelta(minutes=30)) as saver:
        assert saver is not None
        run = warmed_up(config, processes, short)
        run.folder.path.mkdir(exist_ok=True)
        with run.watch.over(run.folder.path, 60 * config.parallel.timeout_minutes):
            free = [_step(run) for _ in range(config.steps)]
            beside = [_beside(run, saver, number, config.steps) for number in range(saves + 1)]
            free += [_step(run) for _ in range(config.steps)]
            begin = time.perf_counter()
            checkpoint.save(run.folder, processes, run.model, run.optimizer, saves + 1, 1)
            waited = time.perf_counter() - begin
        if processes.is_main:
            saved = run.folder.checkpoint(saves + 1)
            size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
            write_json(folder / "saves.json", summary(free, beside, waited, size))


def _step(run: Run) -> float:
    run.processes.barrier()
    begin = time.perf_counter()
    training_step(run, 0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _beside(run: Run, saver: BackgroundSaver, number: int, fewest: int) -> dict[str, Any]:
    """Begin to save, and make steps until the checkpoint is written."""
    run.processes.barrier()
    begin = time.perf_counter()
    checkpoint.save(run.folder, run.processes, run.model, run.optimizer, number, 1, saver)
    copied = time.perf_counter() - begin
    steps: list[float] = []
    writing = True
    while len(steps) < fewest or (writing and len(steps) < MOST_STEPS):
        steps.append(_step(run))
        (other,) = run.processes.largest(saver.writing)
        writing = bool(other)
    saver.wait()
    return {"copy_seconds": copied, "write_seconds": saver.write_seconds, "steps": steps}


def summary(free: list[float], beside: list[dict[str, Any]], waited: float, size: int) -> dict[str, Any]:
    """The numbers of `measure_saves`, of steps without a checkpoint and of what stood beside each background save."""
    usual = median(free)
    saves = []
    for save in beside:
        slower = sum(step - usual for step in save["steps"])
        saves.append(
            {
                "copy_seconds": round(save["copy_seconds"], 4),
                "write_seconds": round(save["write_seconds"], 4),
                "steps_beside": len(save["steps"]),
                "slower_seconds": round(slower, 4),
            }
        )
    first, *timed = saves
    cost = median(save["copy_seconds"] + save["slower_seconds"] for save in timed)
    return {
        "seconds_per_step": round(usual, 4),
        "spread": round(max(free) / usual - 1, 4),
        "checkpoint_gib": round(size / GIB, 3),
        "saves": timed,
        "first_copy_seconds": first["copy_seconds"],
        "cost_seconds": round(cost, 4),
        "cost_of_a_step": round(cost / usual, 4),
        "waited_seconds": round(waited, 4),
    }


def line(row: dict[str, Any]) -> str:
    """A measured row as text."""
    name = f"{row['model']}, {row['tokens']:,} tokens, {row['gpus']} x {row['gpu']}: "
    if "note" in row:
        return name + row["note"] + "\n" + row["messages"][-1500:]
    copies, writes = ([save[key] for save in row["saves"]] for key in ("copy_seconds", "write_seconds"))
    return (
        f"{name}{row['seconds_per_step']:.3g} s a step (the slowest {row['spread']:+.0%}); a checkpoint of "
        f"{row['checkpoint_gib']:.3g} GiB in the background: copied in {median(copies):.3g} s, written in "
        f"{median(writes):.3g} s, costs {row['cost_seconds']:.3g} s, {row['cost_of_a_step']:.1%} of a step; waited "
        f"for: {row['waited_seconds']:.3g} s"
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
