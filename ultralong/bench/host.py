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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultralong.bench.host_options import HostBench, commands
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import locked, make_folder, read_json, write_json

TAIL = 2000  # characters kept of what a failed step said


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
