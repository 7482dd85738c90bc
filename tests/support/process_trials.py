"""Signals, processes that outlive what started them, and two at once, tried through the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from http.server import BaseHTTPRequestHandler

from tests.support.trial_version import ANSWER, Server, Version, environment, last, session, trial, wait


def _survivors(number: int, seconds: float = 6.0) -> list[int]:
    """Processes of a command's session that live on when it is gone; they are ended then."""
    end = time.monotonic() + seconds
    while (left := session(number)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return left


def _killed_build(version: Version, number: signal.Signals) -> tuple[bool, str]:
    texts, out = version.base / "many", version.base / f"many-{number.name}"
    if not texts.exists():
        texts.mkdir()
        for n in range(200):
            (texts / f"{n}.txt").write_text(f"Entry {n}: the tide came in and no ship had passed. " * 3000)
        version.recipe("many.yaml", "many")
    words = ("data", "build", "many.yaml", "--tokenizer", "model", "--length", "256", "--workers", "2")
    process = version.start(*words, "--out", out)
    wait(lambda: len(session(process)) >= 3 and any(out.rglob("*.partial")), 60)
    if len(session(process)) < 3:
        return True, "no workers were started"
    os.kill(process, number)
    left = _survivors(process, 8)
    return bool(left), f"{len(left)} of its workers live on"


@trial("H", "data build --workers 2 killed by KILL", "kill -9 of data build --workers 2")
def killed_build(version: Version) -> tuple[bool, str]:
    return _killed_build(version, signal.SIGKILL)


@trial("H", "data build --workers 2 ended by TERM", "kill -TERM of data build --workers 2")
def ended_build(version: Version) -> tuple[bool, str]:
    return _killed_build(version, signal.SIGTERM)


@trial("H", "two refinements in one folder", "data refine RECIPE, and the same beside it")
def two_refinements(version: Version) -> tuple[bool, str]:
    def slowly(request: BaseHTTPRequestHandler) -> None:
        time.sleep(4)
        request.send_response(200)
        request.send_header("Content-Length", str(len(ANSWER)))
        request.end_headers()
        request.wfile.write(ANSWER)

    with Server(slowly) as server:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", "both")
        first = version.start(*words)
        wait(lambda: bool(server.seen))
        printed = version.command(*words)
        wait(lambda: not session(first))
    return "Another process" not in printed, f"{len(server.seen)} paid answers for 3 conversations: {last(printed)}"


@trial("H", "a run folder whose name starts with a dash", "launch CONFIG, and its search for checkpoints")
def dashed(version: Version) -> tuple[bool, str]:
    (version.base / "-run" / "checkpoints" / "step-0000002").mkdir(parents=True)
    words = ("launch", "run.yaml", "--nodes", "1", "--gpus-per-node", "1", "--out", "dashed", "--set", "out=-run")
    printed = version.command(*words)
    script = version.base / "dashed" / "run.sh"
    if not script.exists():
        return True, last(printed)
    text = script.read_text()
    search = text[text.index("newest() {") :].split("\n}\n")[0] + "\n}\n"
    done = subprocess.run(
        ["bash", "-c", f"run_folder=-run\n{search}newest"],
        cwd=version.base,
        capture_output=True,
        text=True,
        check=False,
    )
    found = done.stdout.strip()
    return not found.endswith("step-0000002"), f"the newest checkpoint is {found or 'none'}"


@trial("H", "a launched host whose agent hears no TERM", "kill -TERM of run.sh")
def deaf(version: Version) -> tuple[bool, str]:
    words = ("launch", "run.yaml", "--nodes", "1", "--gpus-per-node", "1", "--out", "deaf")
    version.command(*words)
    agent = version.base / "agent"
    agent.write_text("#!/bin/bash\ntrap '' TERM\ntouch started\nfor n in {1..100}; do sleep 1; done\n")
    agent.chmod(0o755)
    facts = {"PYTHON": str(agent), "WORKDIR": str(version.base)}
    host = subprocess.Popen(
        ["bash", str(version.base / "deaf" / "run.sh")], env=environment(facts), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait((version.base / "started").exists)
    began = time.monotonic()
    host.terminate()
    try:
        host.wait(45)
        seconds = f"ended after {time.monotonic() - began:.0f} s"
        late = time.monotonic() - began > 30  # Slurm kills what is left then
    except subprocess.TimeoutExpired:
        seconds, late = "still there after 45 s", True
    _survivors(host.pid, 0)
    return late, f"the host is {seconds}"


@trial("I", "the umask while a file is written", "pack RECIPE")
def umask(version: Version) -> tuple[bool, str]:
    script = (
        "import os, sys\nreal, seen = os.umask, []\n"
        "def watched(mask):\n    seen.append(mask)\n    return real(mask)\n"
        "os.umask = watched\nfrom ultralong.cli import main\nsys.argv = ['ultralong', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(f'umask 0: {seen.count(0)}')\n"
    )
    words = [version.python, "-c", script, *version.pack("docs.yaml", "masked")]
    done = subprocess.run(words, cwd=version.base, env=environment(None), capture_output=True, text=True, check=False)
    times = int(done.stderr.rpartition("umask 0: ")[2])
    return times > 0, f"it was 0 {times} times"
