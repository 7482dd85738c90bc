"""Everything that is asked of a host of several GPUs, in one go: `ultralong bench host --gpus 8 --out FOLDER`.

Such a machine is lent for minutes, so nothing is decided on it: the steps are commands of `ultralong bench`, each in
a process of its own with a limit of time, the dearest question first. Each writes its JSON as it goes. A step that
fails is recorded with what it said, and the next one starts; the same command again leaves out what is done.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralong.utils.environment import describe_environment
from ultralong.utils.files import locked, make_folder, read_json, write_json

TAIL = 2000  # characters kept of what a failed step said
MODEL = "meta-llama/Llama-3.1-8B"


@dataclass(frozen=True)
class HostBench:
    """What to measure on one host.

    Attributes:
        gpus: GPUs of the host; they share every row.
        out: Folder of the results.
        host_memory: GiB of host memory for each process.
        rehearse: The same commands in CPU processes, cut down in size: they show that the steps run.
        minutes: Most minutes of one step.
        only: Names of steps to run now; all when empty.
    """

    gpus: int
    out: Path
    host_memory: float = 32.0
    rehearse: bool = False
    minutes: float = 20.0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gpus < 2 or self.gpus & (self.gpus - 1):
            raise ValueError(f"gpus must be a power of two from 2 on, found {self.gpus}.")
        if self.minutes <= 0 or self.host_memory <= 0:
            raise ValueError(f"minutes and host_memory must be above 0, found {self.minutes} and {self.host_memory}.")
        unknown = [name for name in self.only if name not in commands(self)]
        if unknown:
            raise ValueError(f"There is no step {', '.join(unknown)}; there are {', '.join(commands(self))}.")


def commands(wanted: HostBench) -> dict[str, list[str]]:
    """Words behind `ultralong` of each step, by its name, in order.

    Args:
        wanted: What to measure.
    """
    training = ["bench", "train", "HuggingFaceTB/SmolLM2-135M" if wanted.rehearse else MODEL]
    training += ["--gpus", str(wanted.gpus), "--sharded", "--steps", "1"]
    if wanted.rehearse:
        # Attention's schemes and FSDP as on GPUs, in sizes that a CPU has done in a minute.
        lengths, training = ("512", "1024"), [*training, "--layers", "2"]
        training += ["--memory", "activation_checkpointing=true", "layer_tile=256", "loss_tile=128"]
        attention = ("512", "1024")
    else:
        lengths, attention = ("1048576", "4194304"), ("131072", "524288")
        training += ["--kernel", "flash4", "--fit", "--host-memory", f"{wanted.host_memory:g}"]
        training += ["--memory", "layer_tile=32768", "loss_tile=8192"]
    steps = {
        "train_1m": [*training, "--lengths", lengths[0]],
        "train_4m": [*training, "--lengths", lengths[1], "--state-precision", "8bit"],
    }
    ranks = wanted.gpus
    while ranks > 1:
        meshes = [f"{outer}x{ranks // outer}" for outer in (2, 4, 8) if outer < ranks]
        words = ["bench", "attention", "--ranks", str(ranks), "--lengths", *attention]
        words += ["--kernels", *(["auto"] if wanted.rehearse else ["flash4", "cudnn"])]
        words += ["--latency-length", "0", *(["--meshes", *meshes] if meshes else [])]
        steps[f"attention_{ranks}"] = words
        ranks //= 2
    return steps


def bench_host(wanted: HostBench) -> list[dict[str, Any]]:
    """Run the steps that are not done yet.

    Args:
        wanted: What to measure.

    Returns:
        One record a step: `name`, `command`, `file` (its JSON, in the folder), `done`, `seconds`, `date`, and `said`,
        the end of what a failed step printed. They are in `host_NAME.json` of the folder too.

    Raises:
        ValueError: Another process works in the folder.
    """
    folder = make_folder(Path(wanted.out).expanduser())
    title = f"{'rehearsal' if wanted.rehearse else 'host'}_{wanted.gpus}"
    state = folder / f"{title}.json"
    with locked(folder):
        records = {record["name"]: record for record in (read_json(state)["steps"] if state.exists() else ())}
        for name, words in commands(wanted).items():
            done = name in records and records[name]["done"]
            if done or (wanted.only and name not in wanted.only):
                continue
            print(f"{name}: ultralong {shlex.join(words)}", file=sys.stderr, flush=True)
            records[name] = _run(name, words, folder / f"{title}_{name}.json", wanted)
            settings = {**asdict(wanted), "out": str(wanted.out)}
            environment = describe_environment()
            write_json(state, {"settings": settings, "steps": list(records.values()), "environment": environment})
    return list(records.values())


def _run(name: str, words: Sequence[str], file: Path, wanted: HostBench) -> dict[str, Any]:
    """One step in a process of its own; it and its ranks are ended where its time is over."""
    command = [sys.executable, "-m", "ultralong", *words, "--json", str(file)]
    environment = dict(os.environ)
    if wanted.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    file.unlink(missing_ok=True)  # of a try that failed: rows are added to what is there
    started = time.perf_counter()
    try:
        # subprocess kills the step at its limit; its ranks end with their parent (ultralong.utils.processes).
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=60 * wanted.minutes
        )
        said, code = ran.stdout + ran.stderr, ran.returncode
        notes = [row.get("note") for row in read_json(file)["rows"]] if code == 0 else []
        if code == 0 and all(notes):  # the bench notes a case that did not run, and goes on
            said, code = f"{said}\n{notes[-1]}", 1
    except subprocess.TimeoutExpired as error:
        said, code = f"{_text(error.stdout)}{_text(error.stderr)}\nended after {wanted.minutes:g} minutes", -1
    record = {
        "name": name,
        "command": f"ultralong {shlex.join(words)}",
        "file": file.name,
        "done": code == 0,
        "seconds": round(time.perf_counter() - started, 1),
        "date": describe_environment()["date"],
    }
    return record if code == 0 else {**record, "said": said[-TAIL:]}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def summary(records: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """One line a step: what it measured, beside the plan where there is one, or why it ended.

    Args:
        records: What `bench_host` gave.
        folder: Folder of the results.
    """
    lines = []
    for record in records:
        if not record["done"]:
            last = (record["said"].strip().splitlines() or ["it said nothing"])[-1]
            lines.append(f"{record['name']}: failed after {record['seconds']:.0f} s: {last}")
            continue
        rows = read_json(folder / record["file"])["rows"]
        if record["name"].startswith("train"):
            made = rows[-1]
            lines.append(
                f"{record['name']}: {made['seconds_per_step']:.1f} s a step (planned "
                f"{made['planned_seconds_per_step']:.1f}), {made['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU"
            )
        else:
            ran = [row for row in rows if row["tflops"] is not None]
            lines.append(f"{record['name']}: {len(ran)} of {len(rows)} cases ran")
    return lines
