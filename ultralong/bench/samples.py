"""Time and memory of making one sample of each test: `python -m ultralong.bench.samples TOKENIZER --json FILE`.

Each test is made in a process of its own, on one core where the system can pin it, from nothing but its texts on disk
to a finished sample, its fitting included; importing and opening the tokenizer do not count. Wall seconds are of a
machine that may be doing other things, CPU seconds are not. `filled` is the share of the length that prompt and answer
take.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ultralong.bench.results import write_rows
from ultralong.evaluation.tasks.groups import find_questions
from ultralong.evaluation.tasks.samples import GENERATED, make_samples
from ultralong.utils.progress import progress
from ultralong.utils.units import GIB

LENGTHS = (4096, 32768, 131072, 1048576)


def measure(task: str, tokenizer: str, lengths: Sequence[int], data: str | None = None) -> list[dict[str, Any]]:
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
    loaded = AutoTokenizer.from_pretrained(tokenizer)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every test, print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m ultralong.bench.samples", description=__doc__)
    parser.add_argument("tokenizer", help="folder or hub id")
    parser.add_argument("--tasks", nargs="+", default=list(GENERATED), help="tests; by default all that are generated")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--data", help="folder of published questions, or package")
    parser.add_argument("--json", type=Path, required=True, help="write machine and rows to this file, test by test")
    asked = parser.parse_args(arguments)
    os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizers' own threads, in the processes that are started
    rows: list[dict[str, Any]] = []
    for task in progress(asked.tasks, desc="samples", unit="test"):
        # A process for each test, so that its peak is its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            rows += other.submit(measure, task, asked.tokenizer, sorted(asked.lengths), asked.data).result()
        write_rows(asked.json, rows, load_average=_load(), tokenizer=Path(asked.tokenizer).name)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
