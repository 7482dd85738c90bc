"""What checkpoints cost a training: `ultralong bench saves MODEL --tokens N --gpus 2 --sharded`.

One run takes turns: steps without a checkpoint, then a checkpoint that is written in the background
(`async_checkpoints`) with steps beside it until it is on disk, steps without one again, and so on; last a checkpoint
that it waits for. A background save costs the time of its copy to the host, and what the steps beside its writing take
longer than the median of those without. What is measured is told as it comes, and each checkpoint is removed once its
files have the recorded sizes, so that the disk holds one at a time.

Both parts depend on the states that are saved, not on the length of the rows: the whole model on short rows gives the
seconds that a save takes from a step of longer rows too (`other_step`), and in less time.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ultralong.bench.results import last_row
from ultralong.bench.training.case import RowCount, TrainingCase
from ultralong.bench.training.measure import case_config, facts_beside, kept, start_ranks, train_config
from ultralong.bench.training.saves_summary import Event, line, seconds_of, summary, told
from ultralong.bench.training.work import prepare_training, warmed_up
from ultralong.checkpoints.distributed import recorded_files
from ultralong.checkpoints.saving.background import BackgroundSaver, background_saver
from ultralong.planner.shapes import shape_of
from ultralong.training import checkpoint
from ultralong.training.config import TrainConfig
from ultralong.training.parallel import connect
from ultralong.training.step import Run, training_step
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl, read_jsonl
from ultralong.utils.units import GIB

EVENTS = "events.jsonl"  # what the first process has measured so far
STATE_BYTES = {"float32": 8, "8bit": 2.04}  # of AdamW's two states, for each parameter; scales of 8-bit blocks included
COPIES = 2  # without writing, after the first save
LOOK = 0.5  # seconds between looks at what is new

Row = dict[str, Any]


def measure_saves(
    case: TrainingCase,
    saves: int,
    folder: Path | None = None,
    seconds: float | None = None,
    other_step: float | None = None,
    tell: Callable[[str, Row], None] | None = None,
) -> Row:
    """Time a case's steps with and without checkpoints.

    Args:
        case: What to train; its `steps` are those without a checkpoint, before and after each save.
        saves: Background checkpoints, besides a first one, whose copy allocates its memory as well; it is followed by
            copies that nothing writes.
        folder: Where models and rows are kept for the next case, and checkpoints are written: its disk is measured.
        seconds: Begin no save that would end later than so many seconds from now, going by those before; the first
            one is always made.
        other_step: Seconds of another step over the same states, of longer rows for example, whose share is wanted.
        tell: Called with a line and the row so far, whenever something was measured.

    Returns:
        The row, see `saves_summary.summary`; or `note`, where the run failed.

    Raises:
        ValueError: A checkpoint does not fit the folder's disk, or numbers without sense.
    """
    if saves < 0 or (other_step is not None and other_step <= 0):
        raise ValueError(f"saves must be 0 or more and other_step above 0, found {saves} and {other_step}")
    begin = time.time()
    latest = None if seconds is None else begin + seconds
    row: Row = {"model": case.name, "parameters": shape_of(case_config(case)).parameters, "tokens": case.tokens}
    row |= {"gpus": case.gpus, "sharded": case.sharded, "state_precision": case.state_precision}
    with kept(folder) as place:
        if not case.lora.on:
            _check_disk(place, row["parameters"] * (4 + STATE_BYTES[case.state_precision]))
        facts = facts_beside()
        row |= {"gpu": facts["device"], "date": facts["date"], "versions": facts["packages"]}
        made = prepare_training(place, case.model, case.layers, [case.tokens], edges=case.edges)
        with tempfile.TemporaryDirectory(dir=place) as run:
            settings.save(train_config(case, made, Path(run), (RowCount(case.tokens, 1),)), Path(run) / "config.yaml")
            words = [run, made["short"], str(saves), str(case.warm_steps), *([] if latest is None else [str(latest)])]
            with ThreadPoolExecutor(1) as beside:
                running = beside.submit(start_ranks, case.gpus, "ultralong.bench.training.saves", *words)
                events: list[Event] = []
                for event in _follow(Path(run) / EVENTS, running.done):
                    events.append(event)
                    if tell is not None:
                        said = f"{time.time() - begin:4.0f} s: {told(event)}"
                        tell(said, row | summary(events, other_step) | {"complete": False})
                failed = running.result()
            return row | summary(events, other_step) | ({**failed, "complete": False} if failed else {"complete": True})


def bench_saves(
    case: TrainingCase,
    saves: int,
    folder: Path | None,
    seconds: float | None,
    other_step: float | None,
    path: Path | None,
) -> None:
    """`measure_saves`, told as it comes; with `path` as a JSON file's last row from the first save on."""
    put = None if path is None else last_row(path)
    latest: Row = {}

    def tell(said: str, row: Row) -> None:
        latest.update(row)
        print(said, flush=True)
        if put is not None and "cost_seconds" in row:
            put(row)

    def end(number: int, frame: object) -> None:
        print(line(latest) if latest else "nothing was measured", flush=True)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    with signals(end):
        row = measure_saves(case, saves, folder, seconds, other_step, tell)
    if put is not None:
        put(row)
    print(line(row))


@contextmanager
def signals(end: Callable[[int, object], None]) -> Iterator[None]:
    """For a while, be told of an end by a time limit (SIGTERM)."""
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_disk(place: Path, needed: float) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"a checkpoint of about {needed / GIB:.1f} GiB does not fit {place}, where {free / GIB:.1f} GiB are free: "
            "give --folder on a larger disk, or --layers for a part of the model."
        )


def _follow(path: Path, done: Callable[[], bool]) -> Iterator[Event]:
    """Events as they are written, until no more come."""
    seen, last = 0, False
    while not last:
        last = done()  # asked before the last look
        new = read_jsonl(path)[seen:] if path.exists() else []
        yield from new
        seen += len(new)
        if not last:
            time.sleep(LOOK)


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
