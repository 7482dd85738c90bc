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
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ultralong.bench.results import last_row
from ultralong.bench.training.case import RowCount, TrainingCase
from ultralong.bench.training.measure import case_config, facts_beside, kept, train_config
from ultralong.bench.training.ranks import start_ranks
from ultralong.bench.training.saves_summary import Event, line, summary, told
from ultralong.bench.training.saves_work import EVENTS, Row
from ultralong.bench.training.work import prepare_training
from ultralong.planner.shapes import shape_of
from ultralong.utils import settings
from ultralong.utils.files import read_jsonl
from ultralong.utils.units import GIB

STATE_BYTES = {"float32": 8, "8bit": 2.04}  # of AdamW's two states, for each parameter; scales of 8-bit blocks included
LOOK = 0.5  # seconds between looks at what is new


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
        saves: Background checkpoints, besides a first one, which is followed by copies that nothing writes.
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
                running = beside.submit(start_ranks, case.gpus, "ultralong.bench.training.saves_work", *words)
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
