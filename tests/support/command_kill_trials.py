"""Kill trials of whole commands: killed again and again and started again, they must leave what undisturbed ones leave.

    .venv/bin/python tests/support/command_kill_trials.py sft ablate --kills 24 --seed 1

A program is one command or several, one after the other, each of which resumes what it finds. Signals, victims (the
command, or a process that it started) and moments (while it starts, or after some changes of its folder) are drawn from
the seed. A program that ends before all kills were made is begun anew in an empty folder. Prints what was done as JSON;
exits with 1 if anything differs. Not under nohup: the commands would ignore SIGHUP, as they should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_programs import PROGRAMS, prepare
from kill_trials import SIGNALS, made, wait_for

from ultralong.bench.results import write_rows
from ultralong.utils.files import is_locked, read_json, read_jsonl

VICTIMS = ("command", "child")
MOMENTS = ("start", "change")
START = 5.0  # seconds within which a command is killed while it starts
MOST_CHANGES = 60  # of files, before a kill
PATIENCE = 240.0  # seconds that any one start of a command may take
# What a run writes of its own time and place, as keys of JSON or names of files; all else must be the same.
OWN = {
    "seconds", "cpu_seconds", "step_seconds", "seconds_of_last_call", "reused", "environment", "ranks", "slowest_rank",
    "date", "tokens_per_second", "tokens_per_second_per_gpu", ".metadata", ".lock",
}  # fmt: skip


@dataclass
class Trial:
    """One program in one folder.

    Attributes:
        name: Name of the program, of `PROGRAMS`.
        folder: Where it works, in the subfolder `work`; what it needs is made there.
        counts: What was drawn and done.
        wrong: What ought not to be.
    """

    name: str
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The folder that the commands write."""
        return self.folder / "work"

    def start(self, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
        """Start a command; its processes are known by where they put temporary files."""
        (self.folder / "scratch").mkdir(exist_ok=True)
        own = {"TMPDIR": str(self.folder / "scratch"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ultralong", *words]
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **own}, stdout=log, stderr=log)

    def processes(self) -> list[int]:
        """All that a start has begun and that has not ended."""
        mark, found = f"TMPDIR={self.folder / 'scratch'}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it ended meanwhile
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return sorted(found)

    def undisturbed(self) -> dict[str, Any]:
        """What the program leaves when nobody kills it; the folder is empty again then."""
        for words in PROGRAMS[self.name]:
            code = self.start(words).wait(PATIENCE)
            assert code == 0, f"{words} failed with {code}:\n{self.log()}"
        found = contents(self.work)
        shutil.rmtree(self.work)
        return found

    def disturbed(self, kills: int, rng: random.Random) -> dict[str, Any]:
        """What the program leaves when it is killed until so many kills were made or it has ended."""
        for words in PROGRAMS[self.name]:
            while True:
                killing = self.counts["killed"] < kills
                command = self.start(words)
                self.counts["starts"] += 1
                hit = killing and self._disturb(command, rng)
                try:
                    code = command.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self.wrong.append(f"{words[0]} did not end in {PATIENCE:g} s{' after a kill' * hit}")
                    command.kill()
                    code = command.wait()
                self.counts["half written"] += hit and half_written(self.work)
                self._see_to_the_end()
                if code == 0:
                    break
                if not hit:
                    self.wrong.append(f"{words[0]} ended with {code} though nobody killed it:\n{self.log()}")
                    break
        found = contents(self.work)
        shutil.rmtree(self.work)
        return found

    def log(self) -> str:
        """The end of what the commands printed."""
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def _disturb(self, command: subprocess.Popen[bytes], rng: random.Random) -> bool:
        """Kill one of a command's processes at some moment; False where it ended before."""
        number, victim = rng.choice(SIGNALS), rng.choice(VICTIMS)
        moment = rng.choices(MOMENTS, (1, 4))[0]
        until, changes = time.monotonic() + rng.uniform(0, START), Changes(self.work, rng.randrange(1, MOST_CHANGES))
        reached = changes.made if moment == "change" else lambda: time.monotonic() > until
        if not wait_for(lambda: command.poll() is not None or reached(), PATIENCE, pause=0.002):
            raise TimeoutError(f"nothing happened for {PATIENCE:g} s:\n{self.log()}")
        time.sleep(rng.uniform(0, 0.02))
        others = [process for process in self.processes() if process != command.pid]
        if command.poll() is not None:
            return False
        chosen = rng.choice(others) if victim == "child" and others else command.pid
        with suppress(ProcessLookupError):
            os.kill(chosen, number)
            self.counts.update(["killed", number.name, "command" if chosen == command.pid else "child", moment])
            return True
        return False

    def _see_to_the_end(self) -> None:
        if not wait_for(lambda: not self.processes(), 40):
            self.wrong.append(f"{len(self.processes())} processes outlived their command")
            for process in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        locks = [lock.parent for lock in self.work.rglob(".lock")]
        self.wrong += [f"{folder} is still locked" for folder in locks if is_locked(folder)]


class Changes:
    """Counts how often files of a folder come, change or go.

    Args:
        folder: The folder; it need not be there.
        wanted: How many changes `made` waits for.
    """

    def __init__(self, folder: Path, wanted: int) -> None:
        self._folder, self._left, self._seen = folder, wanted, _stamps(folder)

    def made(self) -> bool:
        """Whether so many were made; to be asked often."""
        now = _stamps(self._folder)
        self._left -= len(now ^ self._seen)
        self._seen = now
        return self._left <= 0


def _stamps(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for path, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                at = os.stat(os.path.join(path, file))
                found.add((os.path.join(path, file), at.st_mtime_ns, at.st_size))
    return found


def half_written(folder: Path) -> bool:
    """Whether a kill has left a part of a file or of a checkpoint."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if any("partial" in str(path.relative_to(folder)) or "unfinished" in path.parts for path in files):
        return True
    lines = [path.read_bytes() for path in files if path.suffix == ".jsonl"]
    return any(text and not text.endswith(b"\n") for text in lines)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder by its name: values without `OWN` of JSON, else a hash; None of `OWN`, pages and locks.

    Of a run's checkpoints the last one, and how many there are: a run that was told to stop saved wherever it was.
    """
    files = {path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, Any] = {}
    for place in folder.rglob("checkpoints"):
        *earlier, last = sorted(place.glob("step-*"))
        files -= {path for step in earlier for path in step.rglob("*")}
        found[f"checkpoints before {last.relative_to(folder)}"] = len(earlier)
    return found | {str(path.relative_to(folder)): _content(path) for path in sorted(files)}


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [_without_own(record) for record in read_jsonl(path)]
    if path.suffix == ".json":
        return _without_own(read_json(path))
    if path.suffix in (".html", ".lock") or path.name in OWN:  # a page shows seconds
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_own(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_own(inner) for key, inner in value.items() if key not in OWN}
    return [_without_own(inner) for inner in value] if isinstance(value, list) else value


def differences(alone: dict[str, Any], disturbed: dict[str, Any]) -> list[str]:
    """How what two programs left differs; logs of training and checkpoints as `kill_trials` compares them."""
    found = [f"only one has {name}" for name in sorted(alone.keys() ^ disturbed.keys())]
    return found + [f"{name} differs" for name in sorted(alone.keys() & disturbed) if alone[name] != disturbed[name]]


def command_kill_trials(name: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run a program undisturbed, and under kills until so many were made; compare.

    Args:
        name: The program, of `PROGRAMS`.
        folder: As `prepare` leaves it.
        kills: How many.
        seed: Of what is drawn.

    Returns:
        `program`, `kills`, `seed`, `rounds` (how often it was begun anew), `counts` (starts, kills, kills that left
        something half written, and what was drawn), `wrong` (what was left over, failed or hung) and `differences`;
        both are empty where all is well.
    """
    trial, rng = Trial(name, folder), random.Random(seed)
    alone, rounds, found = trial.undisturbed(), 0, []
    while trial.counts["killed"] < kills and not trial.wrong and not found:
        rounds += 1
        found += differences(alone, trial.disturbed(kills, rng))
    return {
        "program": name,
        "kills": kills,
        "seed": seed,
        "rounds": rounds,
        "counts": dict(sorted(trial.counts.items())),
        "wrong": trial.wrong,
        "differences": found,
    }


def main() -> int:
    """The trials as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="+", choices=sorted(PROGRAMS))
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows as a result file")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import make_tiny_model, tiny_tokenizer

    rows = []
    for name in options.programs:
        with tempfile.TemporaryDirectory(prefix="kill-trials-") as scratch:
            prepare(Path(scratch), made(make_tiny_model), made(tiny_tokenizer))
            rows.append(command_kill_trials(name, Path(scratch), options.kills, options.seed))
    print(json.dumps(rows, indent=2))
    if options.json is not None:
        words = ["--kills", str(options.kills), "--seed", str(options.seed)]
        command = " ".join(["python tests/support/command_kill_trials.py", *options.programs, *words])
        write_rows(options.json, rows, command=command)
    return int(any(row["wrong"] or row["differences"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
