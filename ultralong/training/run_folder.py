"""The folder of a run: its settings, log, checkpoints and result, and what a resumed run may not have changed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.training.config import TrainConfig
from ultralong.utils import settings
from ultralong.utils.files import LOCK, read_json_object, read_jsonl, write_json, write_text

# What a run may change between a checkpoint and its resumption without becoming another run.
FREE_TO_CHANGE = (
    "out",
    "save_every",
    "keep",
    "trackers",
    "parallel",
    "memory",
    "micro_batch_size",
    "compile",
    "async_checkpoints",
    "loss_spike_threshold",
    # Only checked and planned with: a run of a version without them is resumed with a preset that has them.
    "base_model",
    "length",
)
STOPPED = "stopped.json"  # why a run stopped before its end, until it is resumed
NAME = re.compile(r"step-(\d{7})")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run under `config.out`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """One JSON line a step."""
        return self.path / "log.jsonl"

    @property
    def model(self) -> Path:
        """The trained model, a plain Hugging Face folder."""
        return self.path / "model"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"step-{step:07d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Complete checkpoints, oldest first, with their steps."""
        found = ((NAME.fullmatch(entry.name), entry) for entry in (self.path / "checkpoints").glob("step-*"))
        return sorted((int(match[1]), entry) for match, entry in found if match)

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Refuse a folder that `open` would refuse.

        Raises:
            ValueError: The folder holds a run and `resume` is off, or the run there has other settings.
        """
        if self.config.exists():
            if not resume:
                raise ValueError(f"{self.path} holds a run already. Resume it (--resume) or choose another `out`.")
            self._check_same(config)
        elif self.path.exists() and any(x.name != LOCK and x.suffix != ".partial" for x in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run (no config.yaml). Choose an empty folder.")

    def open(self, config: TrainConfig, resume: bool, rows: Sequence[str] | None = None) -> int | None:
        """Make the folder ready; main process only.

        Args:
            config: The run.
            resume: Go on where its newest checkpoint is.
            rows: What its rows are (`RowOrder.content`); None compares nothing.

        Returns:
            The step to resume from, or None to start from step 0.

        Raises:
            ValueError: The folder holds a run and `resume` is off, or the run there has other settings or rows.
        """
        self.check(config, resume)
        if rows is not None and (saved := self.checkpoints()):
            check_same_rows(saved[-1][1], rows)
        shutil.rmtree(self.path / "checkpoints" / "unfinished", ignore_errors=True)
        (self.path / STOPPED).unlink(missing_ok=True)
        settings.save(config, self.config, "Every setting of this run; `ultralong train` with this file repeats it.")
        steps = self.checkpoints()
        self._cut_log(steps[-1][0] if steps else 0)
        return steps[-1][0] if steps else None

    def check_there(self) -> None:
        """Refuse to write on when the folder was moved or deleted: a second one of its name would get the rest.

        Raises:
            FileNotFoundError: It is not there.
        """
        if not self.config.exists():
            raise FileNotFoundError(
                errno.ENOENT, "it was moved or deleted while the run wrote to it, so the run ends", str(self.path)
            )

    def _check_same(self, config: TrainConfig) -> None:
        before = settings.to_mapping(settings.load(TrainConfig, self.config))
        now = settings.to_mapping(config)
        other = [key for key in now if before[key] != now[key] and key not in FREE_TO_CHANGE]
        changed = [line for key in other for line in _differences(key, before[key], now[key])]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings, so it can't be resumed: {'; '.join(changed)}. "
                "Restore them, or choose another `out`."
            )

    def _cut_log(self, step: int) -> None:
        """Drop what was logged after the checkpoint: those steps are done again."""
        if self.log.exists():
            records = read_jsonl(self.log)
            for number, record in enumerate(records, 1):
                if type(record.get("step")) is not int or not isinstance(record.get("loss"), float | int):
                    raise ValueError(f"{self.log}, line {number} is no record of a step. Restore or remove that line.")
            kept = [record for record in records if record["step"] <= step]
            write_text(self.log, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs, a line each; of a group only its keys that do."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{name}.{key}", before.get(key), now.get(key)) for key in {**before, **now}]
        return [line for key, old, new in pairs if old != new for line in _differences(key, old, new)]
    return [f"{name}: {before!r} -> {now!r}"]


def check_same_rows(path: Path, rows: Sequence[str]) -> None:
    """Refuse to resume with rows that are not those of the checkpoint: its step says which were read, by their order.

    Args:
        path: The checkpoint; one of a version that did not record them has nothing to compare.
        rows: What they are now, source by source (`RowOrder.content`).

    Raises:
        ValueError: A source's rows are others.
    """
    try:
        recorded = read_json_object(path / "state.json").get("rows")
    except (OSError, ValueError):
        return  # the checkpoint is damaged, and loading it says where
    if isinstance(recorded, list) and recorded != [*rows]:
        pairs = enumerate(zip(recorded, rows, strict=False))
        number = next((place for place, (old, new) in pairs if old != new), 0)
        raise ValueError(
            f"the rows of data[{number}] are not those that the run in {path.parent.parent} was trained on: they were "
            "packed again from something else. Restore them, or choose another `out`."
        )


def process_counts(world: int) -> dict[str, int]:
    """The processes and hosts of the run that this process is in, for the command that resumes it.

    Args:
        world: Processes of the run.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's; without it all are on this host
    return {"processes": world, "hosts": world // int(here) if here.isdecimal() and int(here) else 1}


@contextmanager
def stop_recorded(folder: RunFolder, world: int) -> Iterator[None]:
    """Record what stops the run of `world` processes, for `ultralong runs`: of them, what the first one met."""
    try:
        yield
    except BaseException as error:
        asked = isinstance(error, KeyboardInterrupt | SystemExit)
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            words = "stopped by Ctrl-C"
        elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code - 128 in set(signal.Signals):
            words = f"stopped by {signal.Signals(error.code - 128).name}"
        with suppress(OSError):  # a full disk, say; the error itself is what the caller has to see
            if folder.config.exists() and not (file := folder.path / STOPPED).exists():
                state = "interrupted" if asked else "failed"
                write_json(file, {"state": state, "reason": words, **process_counts(world)})
        raise
