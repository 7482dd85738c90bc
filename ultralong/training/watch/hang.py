"""A run that makes no progress ends, and leaves on disk which rank stands where.

Each rank has a thread that looks at what its host does and at which collectives are behind it. When nothing changes
for too long, it writes the rank's position and the stacks of its threads to the run's folder, waits a moment for the
other ranks to do the same, says which ranks the others wait for, and ends its process. A rank whose interpreter is
stuck itself, so that this thread can't run, is ended by the C library's timer of `faulthandler`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultralong.attention.collectives import WaitClock
from ultralong.training.run_folder import STOPPED
from ultralong.utils.files import read_json, write_json

GRACE = 10.0  # seconds that ranks get to write where they stand after the first one has
STUCK = 30.0  # seconds after which an interpreter that runs no thread is ended, beyond those without progress
CODE = 1


@dataclass
class Position:
    """Where a rank stands in its step; its main thread says so, its watchdog reads it."""

    step: int = 0
    stage: str = "start"
    patience: float = 1.0

    def at(self, stage: str, step: int | None = None, patience: float = 1.0) -> None:
        """Say what begins now; `patience` is how many times the usual it may take without a sign of progress."""
        self.stage, self.patience = stage, patience
        self.step = self.step if step is None else step


class Watchdog:
    """Ends this process when its run hangs.

    Args:
        record: Folder for what the ranks write; it is made when the first of them finds a hang.
        rank: This one.
        hosts: Of all ranks.
        seconds: Without progress that are too many.
        position: Of this rank.
        clock: Its collectives.
    """

    def __init__(
        self, record: Path, rank: int, hosts: Sequence[str], seconds: float, position: Position, clock: WaitClock
    ) -> None:
        self.record, self.rank, self.hosts, self.seconds = record, rank, hosts, seconds
        self.position, self.clock = position, clock
        self._pause, self._ended = min(1.0, seconds / 20), threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._arm()  # before the thread has its first turn, which a call that holds the interpreter may never give it
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        since, last = time.monotonic(), self._progress()
        while not self._ended.wait(self._pause):
            limit = self._arm()
            if (now := self._progress()) != last:
                since, last = time.monotonic(), now
            waited = time.monotonic() - since
            if waited > limit or self.record.exists():
                self._end(waited)

    def _arm(self) -> float:
        """Have this process ended a little behind its limit even if no thread runs; returns the limit in seconds."""
        limit = self.seconds * self.position.patience
        faulthandler.dump_traceback_later(limit + STUCK, exit=True, file=sys.__stderr__ or sys.stderr)
        return limit

    def _progress(self) -> tuple[Any, ...]:
        return self.position.step, self.position.stage, *self.clock.reached()

    def _end(self, waited: float) -> None:
        """Write where this rank stands, tell of all of them, and end the process."""
        try:
            self._write(waited)
            until = time.monotonic() + min(GRACE, 10 * self._pause)
            while len(found := self._found()) < len(self.hosts) and time.monotonic() < until:
                time.sleep(self._pause / 4)
            text = describe(found, self.hosts, self.record)
            if self.rank == min(found, default=self.rank):
                print(f"error: {text}", file=sys.stderr, flush=True)
                (self.record / "report.txt").write_text(text + "\n", encoding="utf-8")
                if not (stopped := self.record.parent / STOPPED).exists():
                    write_json(stopped, {"state": "failed", "reason": " ".join(text.split())})
        finally:
            os._exit(CODE)  # the main thread is in a call that may never return

    def _write(self, waited: float) -> None:
        ended, standing, on_gpu = self.clock.reached()
        self.record.mkdir(exist_ok=True)
        with open(self.record / f"rank-{self.rank}.txt", "w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        if torch.cuda.is_available():  # NCCL's own record of collectives, for torch's flight recorder
            from torch._C import _distributed_c10d

            if dump := getattr(_distributed_c10d, "_dump_nccl_trace", None):
                (self.record / f"nccl-trace-{self.rank}").write_bytes(dump())
        write_json(
            self.record / f"rank-{self.rank}.json",
            {
                "rank": self.rank,
                "host": self.hosts[self.rank],
                "pid": os.getpid(),
                "step": self.position.step,
                "stage": self.position.stage,
                "collective": standing,
                "collectives_ended": ended,
                "collectives_on_gpu": on_gpu,
                "seconds": round(waited, 1),
            },
        )

    def _found(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(len(self.hosts)):
            with suppress(OSError, ValueError):
                found[rank] = read_json(self.record / f"rank-{rank}.json")
        return found


def describe(found: dict[int, dict[str, Any]], hosts: Sequence[str], record: Path) -> str:
    """Which ranks stand where, in words; those first that the others wait for.

    Args:
        found: What each rank wrote, as far as it did.
        hosts: Of all ranks.
        record: Where it was written.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in found]
    free = [rank for rank, at in found.items() if not at["collective"]]
    behind = [rank for rank, at in found.items() if _passed(at) == min(map(_passed, found.values()))]
    blamed = silent or free or (behind if len(behind) < len(found) else [])
    lines = [f"the run makes no progress. Ranks stand here ({record}/rank-N.txt has their stacks):"]
    for rank in sorted(range(len(hosts)), key=lambda rank: (rank not in blamed, rank)):
        where = "no answer: its process is stopped or stuck, or its host is lost"
        if at := found.get(rank):
            doing = f"waits in the {at['collective']}" if at["collective"] else "in no collective"
            where = f"step {at['step']}, {at['stage']}, {doing}, for {at['seconds']:.3g} s"
        lines.append(f"  rank {rank} on {hosts[rank]}: {where}{' <- the others wait for it' * (rank in blamed)}")
    return "\n".join(lines)


def _passed(at: dict[str, Any]) -> tuple[int, int]:
    return int(at["collectives_ended"]), int(at["collectives_on_gpu"])
