"""Kill trials: a run on two processes is killed again and again and resumed, and must end as one that was left alone.

    .venv/bin/python tests/support/kill_trials.py --kills 30 --seed 1

Signals, victims (the command, its agent, a rank) and moments (while it starts, in a step, while a checkpoint is saved,
at the end) are drawn from the seed. Prints what was done as JSON; exits with 1 if anything differs. Not under nohup:
the run would ignore SIGHUP, as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import equal

from ultralong.training.config import ParallelConfig, TrainConfig
from ultralong.utils import settings
from ultralong.utils.files import is_locked, read_jsonl

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
VICTIMS = ("command", "agent", "rank")
MOMENTS = ("start", "step", "save", "end")
START = 25.0  # seconds within which a run is killed while it starts
PATIENCE = 240.0  # seconds that any one start of the run may take
SAME = ("step", "tokens", "loss", "grad_norm", "lr", "targets", "loss_by_position")


def kill_trials(
    config: TrainConfig, folder: Path, kills: int, seed: int, moments: Sequence[str] = MOMENTS
) -> dict[str, Any]:
    """Train `config` on two processes undisturbed, and once more under `kills` kills; compare.

    Args:
        config: The run; its steps and `save_every` give the moments. Its folder is chosen here.
        folder: Where both runs go.
        kills: How often the second one is killed before it may end; a run with too few steps for them ends earlier.
        seed: Of what is drawn.
        moments: When it may be killed, of `MOMENTS`.

    Returns:
        `kills` that were asked for, counts (starts, kills, kills that left a checkpoint half written, and what was
        drawn), `survivors` (kills with processes left after 40 s), and `differences` (empty where weights and log are
        equal).
    """
    rng = random.Random(seed)
    config = replace(config, parallel=ParallelConfig(context_parallel_size=2))
    alone, disturbed = (replace(config, out=str(folder / name)) for name in ("undisturbed", "disturbed"))
    code = _start(alone, folder).wait(PATIENCE)
    assert code == 0, f"the undisturbed run failed with {code}"
    counts: Counter[str] = Counter()
    survivors = 0
    while counts["killed"] < kills and not (Path(disturbed.out) / "result.json").exists():
        number, victim, moment = rng.choice(SIGNALS), rng.choice(VICTIMS), rng.choice(moments)
        counts.update([number.name, victim, moment])
        command = _start(disturbed, folder)
        counts["starts"] += 1
        reached = _wait_for_moment(moment, disturbed, command, rng)
        counts["killed"] += reached and _kill(number, victim, folder, command, rng)
        with suppress(subprocess.TimeoutExpired):
            command.wait(60)
        counts["half written"] += (Path(disturbed.out) / "checkpoints" / "unfinished").exists()
        survivors += not wait_for(lambda: not _processes(folder) and not is_locked(disturbed.out), 40)
    command = _start(disturbed, folder)
    counts["starts"] += 1
    code = command.wait(PATIENCE)
    return {
        "kills": kills,
        "seed": seed,
        "counts": dict(sorted(counts.items())),
        "survivors": survivors,
        "differences": [f"the last start ended with {code}"] if code else _differences(alone, disturbed),
    }


def _start(config: TrainConfig, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / f"{Path(config.out).name}.yaml"
    settings.save(config, path)
    words = [sys.executable, "-m", "ultralong", "train", str(path), "--processes", "2", "--quiet", "--resume"]
    (folder / "scratch").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder / "scratch"), "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def _wait_for_moment(moment: str, config: TrainConfig, command: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Wait until the run is in the middle of something; False where it ended before."""
    out = Path(config.out)
    unfinished = out / "checkpoints" / "unfinished"
    left = _changed(unfinished)  # by the start before
    until, step = time.monotonic() + rng.uniform(0, START), rng.randrange(1, config.steps)
    reached: dict[str, Callable[[], bool]] = {
        "start": lambda: time.monotonic() > until,
        "step": lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().count(b"\n") >= step,
        "save": lambda: _changed(unfinished) not in (None, left),
        "end": lambda: (out / "checkpoints" / f"step-{config.steps:07d}").exists(),
    }
    if not wait_for(lambda: command.poll() is not None or reached[moment](), PATIENCE, pause=0.002):
        raise TimeoutError(f"nothing happened for {PATIENCE:g} s")
    time.sleep(rng.uniform(0, {"start": 0, "step": 0.05, "save": 0.1, "end": 0.5}[moment]))
    return command.poll() is None


def _kill(
    number: signal.Signals, victim: str, folder: Path, command: subprocess.Popen[bytes], rng: random.Random
) -> bool:
    """Send the signal; where the victim is not there yet, to the command. False where nothing is left to kill."""
    found = [pid for pid, words in _processes(folder) if {"agent": ".agent", "rank": ".rank"}.get(victim, "?") in words]
    with suppress(ProcessLookupError):
        os.kill(rng.choice(sorted(found)) if found else command.pid, number)
        return True
    return False


def _changed(path: Path) -> int | None:
    """When something there was changed last; None where nothing is."""
    with suppress(FileNotFoundError):
        return path.stat().st_ctime_ns
    return None


def _processes(folder: Path) -> list[tuple[int, str]]:
    """Processes of the trials, with their command lines."""
    return [
        (pid, words)
        for pid, words in _commands()
        if str(folder) in words and "ultralong" in words and pid != os.getpid()
    ]


def _commands() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.05) -> bool:
    """Ask until something is so; False where it is not in so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
    return True


def _differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """What the second run left other than the first: weights, log, or files that do not belong there."""
    logs = [
        [{key: record[key] for key in SAME} for record in read_jsonl(f"{run.out}/log.jsonl")] for run in (one, other)
    ]
    found = [] if logs[0] == logs[1] else ["the logs differ"]
    first, second = (load_file(f"{run.out}/model/model.safetensors") for run in (one, other))
    if first.keys() != second.keys():
        return [*found, "the models hold other tensors"]
    found += [f"{name} differs" for name in first if not equal(first[name], second[name])]
    # A run that was told to stop saved wherever it was, so only the last checkpoint is of one name.
    files = [
        {
            str(path.relative_to(run.out))
            for path in Path(run.out).rglob("*")
            if "step-" not in str(path) or f"step-{run.steps:07d}" in str(path)
        }
        for run in (one, other)
    ]
    kept = [len(list(Path(run.out, "checkpoints").iterdir())) for run in (one, other)]
    found += [f"the runs keep {kept[0]} and {kept[1]} checkpoints"] if kept[0] != kept[1] else []
    return found + [f"only one run has {name}" for name in sorted(files[0] ^ files[1])]


def made(fixture: Any) -> Any:
    """What a fixture of pytest gives, outside of pytest."""
    return (getattr(fixture, "_fixture_function", None) or fixture.__wrapped__)()


def main() -> int:
    """The trials as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--background", action="store_true", help="checkpoints are written in the background")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import make_tiny_model, tiny_tokenizer
    from tiny_run import make_run

    with tempfile.TemporaryDirectory(prefix="kill-trials-") as scratch:
        config = make_run(Path(scratch), made(make_tiny_model)(), made(tiny_tokenizer), steps=options.steps)
        config = replace(
            config, model=f"{scratch}/model", data=tuple(replace(s, rows=f"{scratch}/{s.rows}") for s in config.data)
        )
        config = replace(config, save_every=options.save_every, async_checkpoints=options.background)
        found = kill_trials(config, Path(scratch), options.kills, options.seed, options.moments)
        if found["differences"] or found["survivors"]:
            sys.stderr.write(Path(scratch, "log").read_text(errors="replace")[-6000:])
    print(json.dumps(found, indent=2))
    return int(bool(found["differences"] or found["survivors"]))


if __name__ == "__main__":
    sys.exit(main())
