"""Time and memory of making one sample of each test: `ultralong bench samples TOKENIZER --json FILE`.

Each test is made in a process of its own, on one core where the system can pin it, from nothing but its texts on disk
to a finished sample, its fitting included; importing and opening the tokenizer do not count. Wall seconds are of a
machine that may be doing other things, CPU seconds are not. `filled` is the share of the length that prompt and answer
take.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ultralong.bench.results import write_rows
from ultralong.evaluation.tasks.groups import find_questions
from ultralong.evaluation.tasks.samples import GENERATED, make_samples
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.progress import progress
from ultralong.utils.units import GIB


def measure_task(task: str, tokenizer: str, lengths: Sequence[int], data: str | None = None) -> list[dict[str, Any]]:
    """Make one sample of a test at each length, in this process.

    Args:
        task: Name of the test.
        tokenizer: Folder or hub id.
        lengths: Tokens, shortest first: the peak of a length includes those before.
        data: Folder of published questions, or `package`.

    Returns:
        One row a length: `task`, `length`, `tokens`, `filled`, `seconds`, `cpu_seconds`, `peak_gib`; or a `note` with
        the reason where none could be made.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    loaded = load_tokenizer(tokenizer)
    loaded("A first text.")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            questions = find_questions(task, None if data is None else Path(data))
            (sample,) = make_samples(task, loaded, length, 1, questions=questions)
        except ValueError as error:
            reason = str(error).splitlines()[0].replace(data or "\0", "the folder of data")[:200]
            return [*rows, {"task": task, "length": length, "note": reason}]
        rows.append(
            {
                "task": task,
                "length": length,
                "tokens": sample["length"],
                "filled": round(sample["length"] / length, 4),
                "seconds": round(time.perf_counter() - start, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_gib": round(_peak_gib(), 2),
            }
        )
    return rows


def _load() -> float | None:
    """The load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _peak_gib() -> float:
    """Most memory of this process so far. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def _on_one_thread() -> None:
    """For a process of its own, before its first text: the tokenizers start their threads with that."""
    os.environ["RAYON_NUM_THREADS"] = "1"


def measure_samples(
    tokenizer: str, path: Path, tasks: Sequence[str], lengths: Sequence[int], data: str | None
) -> list[dict[str, Any]]:
    """Make one sample of every test at every length, each test in a process of its own.

    Args:
        tokenizer: Folder or hub id.
        path: JSON file for machine and rows, written test by test.
        tasks: Tests; all that are generated when empty.
        lengths: Tokens.
        data: Folder of published questions, or `package`.

    Returns:
        The rows of `measure_task`, test by test.
    """
    rows: list[dict[str, Any]] = []
    for task in progress(tasks or list(GENERATED), desc="samples", unit="test"):
        # A process for each test, so that its peak is its own.
        with ProcessPoolExecutor(1, get_context("spawn"), _on_one_thread) as other:
            rows += other.submit(measure_task, task, tokenizer, sorted(lengths), data).result()
        write_rows(path, rows, load_average=_load(), tokenizer=Path(tokenizer).name)
    return rows
