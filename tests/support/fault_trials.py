"""Faults and hostile inputs, tried on a version of the library through its command line, and on another beside it.

    python -m tests.support.fault_trials AFTER_PYTHON [BEFORE_PYTHON] [--only NAME ...] --json FILE

Each trial makes its input, runs one command, and says whether the fault was there. It uses no code of the library, so
that the same trial runs on any version. What no command shows in seconds is not tried here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import (  # noqa: F401 - register
    endpoint_trials,
    file_trials,
    further_trials,
    hostile_trials,
    process_trials,
    unlikely_trials,
)
from tests.support.trial_version import DEEP, WARM, Server, Version, environment, last, main, told, trial, wait


@trial("H", "a flipped bit in a run's checkpoint", "train run/config.yaml --resume")
def flipped(version: Version) -> tuple[bool, str]:
    file = next(version.again().glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        return told(version, "train", "run.yaml", "--resume")
    finally:
        file.write_bytes(kept)


@trial("H", "state.json of the wrong shape", "train run/config.yaml --resume")
def state(version: Version) -> tuple[bool, str]:
    file = version.again() / "state.json"
    kept = file.read_text()
    file.write_text("[]")
    try:
        return told(version, "train", "run.yaml", "--resume")
    finally:
        file.write_text(kept)


@trial("H", "a deleted shard of rows", "pack RECIPE (again)")
def deleted(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "rows", version.base / "cut")
    (version.base / "cut" / "rows-00000.npy").unlink()
    printed = version.command(*version.pack("docs.yaml", "cut"))
    there = (version.base / "cut" / "rows-00000.npy").exists()
    return not there, f"{last(printed)}; the shard is {'there' if there else 'missing'}"


@trial("H", "another program's file rows-notes.npy in the folder", "pack RECIPE (again)")
def foreign(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "rows", version.base / "own")
    (version.base / "own" / "manifest.json").unlink()
    (version.base / "own" / "rows-notes.npy").write_text("mine")
    version.command(*version.pack("docs.yaml", "own"))
    there = (version.base / "own" / "rows-notes.npy").exists()
    return not there, f"the file is {'there' if there else 'deleted'}"


@trial("H", "two trainings in one folder", "train CONFIG, and train CONFIG --resume beside it")
def two(version: Version) -> tuple[bool, str]:
    words = ("train", "run.yaml", "--set", f"out={version.base}/two", "steps=20000")
    first = version.start(*words)
    try:
        wait(lambda: (version.base / "two" / "log.jsonl").exists())
        printed = version.command(*words, "--resume")
    finally:
        with contextlib.suppress(ProcessLookupError):  # where the second one ended it
            os.kill(first, signal.SIGKILL)
    return "Another process is training" not in printed, last(printed)


def _orphans(version: Version, number: signal.Signals) -> tuple[bool, str]:
    log = version.base / f"ranks-{number.name}" / "log.jsonl"
    process = version.start("train", "run.yaml", "--processes", "2", "--set", f"out={log.parent}", "steps=20000")
    wait(log.exists, 120)
    trained = "" if log.exists() else "nothing was trained; "
    os.kill(process, number)
    time.sleep(4 if number == signal.SIGKILL else 25)  # what can be heard leaves time to save
    size = log.stat().st_size if log.exists() else 0
    time.sleep(4)
    grows = log.exists() and log.stat().st_size > size
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if _works_in(entry, version.base):
            os.kill(int(entry), signal.SIGKILL)
    return bool(grows or trained), f"{trained}the run's log {'grows on' if grows else 'stands still'} afterwards"


@trial("H", "train --processes 2 killed by KILL", "kill -9 of train --processes 2")
def killed(version: Version) -> tuple[bool, str]:
    return _orphans(version, signal.SIGKILL)


@trial("H", "train --processes 2 ended by TERM", "kill -TERM of train --processes 2")
def ended(version: Version) -> tuple[bool, str]:
    return _orphans(version, signal.SIGTERM)


@trial("H", "train --processes 2 ended by HUP", "kill -HUP of train --processes 2")
def hung_up(version: Version) -> tuple[bool, str]:
    return _orphans(version, signal.SIGHUP)


def _works_in(entry: str, base: Path) -> bool:
    """Whether a process is a rank of the trial's run: a Python in its folder that forks for no one."""
    try:
        words = Path(f"/proc/{entry}/cmdline").read_bytes()
        return Path(f"/proc/{entry}/cwd").resolve() == base and WARM.encode() not in words
    except OSError:
        return False


@trial("H", "a disk that fills in training", "train CONFIG (files of 100 KB at most)")
def full(version: Version) -> tuple[bool, str]:
    words = ("train", "run.yaml", "--set", f"out={version.base}/full")
    return told(version, *words, file_limit=100_000)


@trial("H", "pickled weights", "train CONFIG")
def pickled(version: Version) -> tuple[bool, str]:
    model = version.copy("pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return told(version, "train", "run.yaml", "--set", f"model={model}", f"out={version.base}/pickled-run")


@trial("H", "a safetensors header of wrong types", "extend MODEL --to 4096")
def header(version: Version) -> tuple[bool, str]:
    text = json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}).encode()
    (version.copy("header") / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return told(version, "extend", "header", "--to", "4096", "--out", "header-out")


@trial("H", "a config nested 100,000 deep", "extend MODEL --to 4096")
def deep(version: Version) -> tuple[bool, str]:
    (version.copy("deep") / "config.json").write_text('{"a": ' + DEEP + "}")
    return told(version, "extend", "deep", "--to", "4096", "--out", "deep-out")


@trial("H", "extend into a link to a folder", "extend MODEL --to 4096 --out LINK")
def into_link(version: Version) -> tuple[bool, str]:
    (version.base / "real").mkdir()
    (version.base / "link").symlink_to("real")
    printed = version.command("extend", "model", "--to", "4096", "--out", "link")
    return not printed.endswith("exit 0"), last(printed)


@trial("H", "--set with broken YAML", "pack RECIPE --set seed=[")
def broken_set(version: Version) -> tuple[bool, str]:
    return told(version, *version.pack("docs.yaml", "broken"), "--set", "seed=[")


@trial("H", "a file whose name is no UTF-8", "pack RECIPE")
def odd_name(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "texts", version.base / "odd")
    shutil.copy(version.base / "texts" / "0.txt", os.fsencode(version.base / "odd") + b"/\xff.txt")
    version.recipe("odd.yaml", "odd")
    printed = version.command(*version.pack("odd.yaml", "odd-rows"))
    return not printed.endswith("exit 0"), last(printed)


@trial("H", "an endpoint that answers JSON nested 100,000 deep", "data refine RECIPE --url URL")
def deep_answer(version: Version) -> tuple[bool, str]:
    with Server(DEEP.encode()) as server:
        words = (
            "data",
            "refine",
            "chat.yaml",
            "--url",
            server.url,
            "--model",
            "m",
            "--retries",
            "0",
            "--out",
            "deeply",
        )
        printed = version.command(*words)
    return "Traceback" in printed or not printed.endswith("exit 0"), last(printed)


@trial("H", "one document of 8 MB", "pack RECIPE, its memory")
def memory(version: Version) -> tuple[bool, str]:
    (version.base / "large").mkdir()
    (version.base / "large" / "a.txt").write_text("The tide came in and no ship had passed today. " * 170_000)
    version.recipe("large.yaml", "large")
    script = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=-3, stderr=-3);"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    )
    words = [version.python, "-m", "ultralong", *version.pack("large.yaml", "large-rows")]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=version.base, env=environment(None), stdout=-1)
    code, used = map(int, done.stdout.split())
    return code != 0 or used > 1000, f"exit {code}, {used:,} MiB"


if __name__ == "__main__":
    main()
