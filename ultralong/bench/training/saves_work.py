"""The processes of `ultralong bench saves`: `python -m ultralong.bench.training.saves_work FOLDER SHORT SAVES WARM`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ultralong.bench.training.saves_summary import Event, seconds_of
from ultralong.bench.training.work import warmed_up
from ultralong.checkpoints.distributed import recorded_files
from ultralong.checkpoints.saving.background import BackgroundSaver, background_saver
from ultralong.training import checkpoint
from ultralong.training.config import TrainConfig
from ultralong.training.parallel import connect
from ultralong.training.step import Run, training_step
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl

EVENTS = "events.jsonl"  # what the first process has measured so far
COPIES = 2  # without writing, after the first save

Row = dict[str, Any]


def work(folder: Path, short: str, saves: int, warm_steps: int = 0, latest: float | None = None) -> None:
    """What each process runs; the first one writes `events.jsonl`.

    Args:
        folder: With `config.yaml`.
        short: Folder of short rows, to warm up with.
        saves: See `measure_saves`.
        warm_steps: Steps over the run's own rows before anything is timed.
        latest: When to have ended, in seconds as `time.time` counts them.
    """
    begin = time.perf_counter()
    config = settings.load(TrainConfig, folder / "config.yaml")
    with connect(config) as processes, background_saver(True, timedelta(minutes=30)) as saver:
        assert saver is not None
        run = warmed_up(config, processes, short, warm_steps=warm_steps)
        run.folder.path.mkdir(exist_ok=True)
        turns = _Turns(run, saver, folder / EVENTS, latest)
        turns.note("ready", time.perf_counter() - begin)
        with run.watch.over(run.folder.path, 60 * config.parallel.timeout_minutes):
            turns.free()
            turns.reserved()
            for number in range(saves + 1):
                if number and not turns.has_time(also=config.steps):
                    break
                turns.beside(number)
                if number == 0:
                    turns.copies(COPIES)
                turns.free()
            if turns.has_time():
                turns.waited(saves + 1)


class _Turns:
    """The parts of one run, and what was measured of them so far; all processes call the same.

    Args:
        run: The run.
        saver: Writes its checkpoints.
        path: Where the first process notes events.
        latest: When to have ended.
    """

    def __init__(self, run: Run, saver: BackgroundSaver, path: Path, latest: float | None) -> None:
        self.run, self.saver, self.path, self.latest = run, saver, path, latest
        self.events: list[Event] = []

    def has_time(self, also: int = 0) -> bool:
        """Whether one more checkpoint, and so many steps, would end in time, going by those before."""
        if self.latest is None:
            return True
        steps, copies, writes = (seconds_of(self.events, what) for what in ("free", "copied", "written"))
        ends = time.time() + (also + 1) * max(steps) + min(copies) + max(writes)
        (late,) = self.run.processes.largest(ends > self.latest)
        return not late

    def free(self) -> None:
        """Steps without a checkpoint."""
        for _ in range(self.run.config.steps):
            self.note("free", self._step())

    def reserved(self) -> None:
        """Make the memory for the copies."""
        self.run.processes.barrier()
        begin = time.perf_counter()
        self.saver.reserve(checkpoint.states_to_save(self.run.model, self.run.optimizer))
        self.run.processes.barrier()
        self.note("reserved", time.perf_counter() - begin)

    def beside(self, number: int) -> None:
        """Begin to save, and make steps until the checkpoint is written."""
        self.note("copied", self._save(number, self.saver), save=number)
        while True:
            self.note("beside", self._step(), save=number)
            (writing,) = self.run.processes.largest(self.saver.writing)
            if not writing:
                break
        self.saver.wait()
        saver = self.saver
        facts = {"plan": round(saver.plan_seconds, 4), "shards": round(saver.shard_seconds, 4), "files": parts(saver)}
        self.note("written", saver.write_seconds, save=number, **facts, bytes=self._removed(number))

    def copies(self, count: int) -> None:
        """Copy to the memory that is there since the first save, and write nothing."""
        for _ in range(count):
            self.run.processes.barrier()
            begin = time.perf_counter()
            self.saver.copy(checkpoint.states_to_save(self.run.model, self.run.optimizer))
            self.note("copied", time.perf_counter() - begin)

    def waited(self, number: int) -> None:
        """A checkpoint that is waited for."""
        self.note("waited", self._save(number), bytes=self._removed(number))

    def _step(self) -> float:
        self.run.processes.barrier()
        begin = time.perf_counter()
        training_step(self.run, 0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _save(self, number: int, saver: BackgroundSaver | None = None) -> float:
        run = self.run
        run.processes.barrier()
        begin = time.perf_counter()
        checkpoint.save(run.folder, run.processes, run.model, run.optimizer, number, 1, saver)
        return time.perf_counter() - begin

    def _removed(self, number: int) -> int:
        """Bytes of a checkpoint, whose files must be as they were recorded; it is removed."""
        if not self.run.processes.is_main:
            return 0
        path = self.run.folder.checkpoint(number)
        for name, facts in recorded_files(path).items():
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                raise RuntimeError(f"{path / name} has {size:,} bytes where {facts['bytes']:,} were written")
        size = sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(path)
        return size

    def note(self, what: str, seconds: float, **more: Any) -> None:
        """What was measured."""
        self.events.append({"what": what, "seconds": round(seconds, 4), **more})
        if self.run.processes.is_main:
            append_jsonl(self.path, self.events[-1])


def parts(saver: BackgroundSaver) -> list[Row]:
    """The files of this process in the saver's last write: bytes, and seconds of the thread of each."""
    facts = [asdict(file) for _, file in sorted(saver.files.items())]
    return [{name: round(value, 4) for name, value in each.items() if name != "sha256"} for each in facts]


def run_words(words: Sequence[str]) -> None:
    """`work` with the words of its command."""
    work(Path(words[0]), words[1], int(words[2]), int(words[3]), *map(float, words[4:]))


if __name__ == "__main__":
    run_words(sys.argv[1:])
