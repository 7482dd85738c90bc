"""What became of runs, from the files of their own folders: how far each is, how fast, and what stopped it."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralong.training.run_folder import STOPPED, RunFolder
from ultralong.utils.files import is_locked, read_json, read_jsonl
from ultralong.utils.text_formats import read_yaml

RECENT = 10  # steps whose median is the rate
STATES = ("running", "finished", "failed", "interrupted")


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it.

    Attributes:
        folder: The run's folder.
        state: One of `STATES`: running (a process holds the folder), finished (the model is exported), failed (it
            recorded an error), or interrupted (it was stopped or killed, and no process holds the folder).
        step: Steps that are logged.
        steps: Steps of the whole run.
        saved: Step of the newest checkpoint; a resumption starts from it. 0 where there is none.
        loss: Of the last logged step, in nats per target; None before the first.
        tokens_per_second: Median of the last ten logged steps; None before the first.
        seconds_left: At that rate, for a run that is not finished; None where it is not known.
        reason: What the run recorded when it stopped, or what is wrong with the folder's files.
    """

    folder: str
    state: str
    step: int
    steps: int
    saved: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self)


def find_runs(folder: str | os.PathLike[str]) -> list[RunState]:
    """The runs in a folder, at any depth, those that changed last first. Nothing is written.

    Args:
        folder: A run's folder, or one that holds such folders.

    Raises:
        ValueError: There is no such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder. Give a run's folder (its `out`), or one that holds such folders.")
    found = sorted(_run_folders(place), key=_changed, reverse=True)
    return [state_of(path) for path in found]


def state_of(folder: Path) -> RunState:
    """The state of one run's folder."""
    run, problems = RunFolder(folder), []
    try:
        records = [record for record in read_jsonl(run.log) if isinstance(record.get("step"), int)]
    except FileNotFoundError:
        records = []
    except (ValueError, OSError) as error:  # one folder that can't be read does not hide the others
        records, problems = [], [str(error)]
    steps = _settings(run.config).get("steps")
    steps = steps if isinstance(steps, int) else 0
    step, recent = (records[-1]["step"] if records else 0), records[-RECENT:]
    saved = run.checkpoints()
    stopped = _recorded(folder / STOPPED)
    if is_locked(folder):
        state, reason = "running", ""
    elif step == steps and _recorded(folder / "result.json"):
        state, reason = "finished", ""
    elif stopped.get("state") == "failed":
        state, reason = "failed", str(stopped.get("reason", ""))
    else:
        state, reason = "interrupted", str(stopped.get("reason", "ended without a word: killed, or its host was lost"))
    rate = _median(recent, "tokens_per_second")
    seconds = _median(recent, "seconds")
    left = None if state == "finished" or seconds is None else round(seconds * (steps - step), 3)
    return RunState(
        str(folder), state, step, steps, saved[-1][0] if saved else 0, records[-1].get("loss") if records else None,
        rate, left, "; ".join([*problems, reason] if reason else problems),
    )  # fmt: skip


def started_on(folder: Path) -> tuple[int, int]:
    """Processes and hosts that the run of a folder was last on, as it recorded when it stopped or last saved; or 1, 1.

    A run that was killed before its first checkpoint has recorded neither, and one of 0.3 no hosts.
    """
    saved = RunFolder(folder).checkpoints()
    told = (_recorded(saved[-1][1] / "state.json") if saved else {}) | _recorded(folder / STOPPED)
    processes, hosts = (told.get(name) for name in ("processes", "hosts"))
    return (processes if type(processes) is int else 1, hosts if type(hosts) is int else 1)


def resume_command(folder: Path) -> str:
    """The command, for the current folder, that resumes the run of a folder.

    On as many processes as it was on, where one host had them all; those of several hosts are not one command's to
    start.
    """
    processes, hosts = started_on(folder)
    command = _resume_command(folder)
    return f"{command} --processes {processes}" if processes > 1 and hosts == 1 else command


def _resume_command(folder: Path) -> str:
    config, here = RunFolder(folder).config, folder.resolve()
    said = _settings(config).get("out")
    out = said if isinstance(said, str) else ""
    if Path(out).resolve() == here:
        return shlex.join(["ultralong", "train", str(config), "--resume"])
    started = here.parents[len(Path(out).parts) - 1] if 0 < len(Path(out).parts) <= len(here.parents) else here
    if started != here and started / out == here:
        # Its config's relative paths, to the model and the rows too, are relative to the folder it was started in.
        command = shlex.join(["ultralong", "train", str(Path(out) / config.name), "--resume"])
        return f"cd {shlex.quote(str(started))} && {command}"
    # The run was moved: by its config's `out` alone another one would start, at the first step, where it was before.
    return shlex.join(["ultralong", "train", str(config), "--resume", "--set", f"out={folder}"])


def _run_folders(place: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(place):
        if "config.yaml" in files and _is_run(Path(path)):
            folders.clear()
            yield Path(path)
        # What a run or a checkpoint consists of holds no further runs, and may be many files.
        folders[:] = [name for name in folders if name != "checkpoints" and not name.startswith(".")]


def _is_run(path: Path) -> bool:
    """Whether a folder was trained in: launch scripts and rows have a config.yaml too, but no lock and no log."""
    return any((path / name).exists() for name in (".lock", "log.jsonl", "checkpoints"))


def _changed(path: Path) -> float:
    return max((path / name).stat().st_mtime for name in ("config.yaml", "log.jsonl") if (path / name).exists())


def _settings(path: Path) -> dict[str, Any]:
    """The config as it was written, whichever version wrote it."""
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = [float(record[name]) for record in records if isinstance(record.get(name), float | int)]
    return round(statistics.median(values), 3) if values else None


def table(runs: list[RunState]) -> str:
    """Runs as lines for people."""
    rows = [("run", "state", "step", "saved", "loss", "tokens/s", "left", "")]
    for run in runs:
        loss = "-" if run.loss is None else f"{run.loss:.3f}"
        rate = "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        left = "-" if run.seconds_left is None else _duration(run.seconds_left)
        rows.append((run.folder, run.state, f"{run.step}/{run.steps}", str(run.saved), loss, rate, left, run.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
