"""A process beside this one that traces attention over several ranks: torch's fake process group is global.

It reads one workload a line from standard input, as JSON, and answers each with one line. It is started once, while
this process still imports and counts the model, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralong.utils.processes import answer_of, without_collections

if TYPE_CHECKING:
    from ultralong.planner.traces.attention import AttentionTrace, AttentionWorkload

PATIENCE = 5.0  # seconds for its end
_running: list[subprocess.Popen[str]] = []


def start() -> subprocess.Popen[str]:
    """The process, started where it does not run yet; it imports what it needs while the caller goes on."""
    if _running and _running[0].poll() is None:
        return _running[0]
    root = str(Path(__file__).parents[3])
    paths = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": root + (os.pathsep + paths if paths else ""),
        "CUDA_VISIBLE_DEVICES": "",  # it needs no GPU, and must hold no memory of one
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from ultralong.planner.traces.child import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    _running[:] = [process]
    return process


def stop() -> None:
    """End the process, if it runs."""
    for process in _running:
        if process.stdin is not None and process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and a question was not sent
                process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # a process that was forked from this one holds the pipe open, too
                process.kill()
                process.wait()
            process.stdout.close()
    _running.clear()


atexit.register(stop)


@lru_cache(maxsize=256)
def attention_trace(workload: AttentionWorkload) -> AttentionTrace:
    """`ultralong.planner.traces.attention.trace_attention`, in the other process where the row is shared.

    Raises:
        ValueError: The trainer would refuse this row too; says why.
        RuntimeError: The other process failed; its traceback is on standard error.
    """
    from ultralong.planner.traces.attention import trace_attention

    if workload.outer * workload.inner == 1:
        return trace_attention(workload)
    process = start()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(workload)) + "\n")
        process.stdin.flush()
        answer = answer_of(process)
    except BrokenPipeError:
        answer = ""
    if not answer:
        code = process.poll()
        stop()
        raise RuntimeError(f"the planner's process for shared rows ended with exit code {code}")
    return _parsed(json.loads(answer))


def _parsed(answer: dict[str, Any]) -> AttentionTrace:
    from ultralong.planner.traces.attention import AttentionTrace, PassTrace

    if "error" in answer:
        raise {"ValueError": ValueError}.get(answer["kind"], RuntimeError)(answer["error"])
    forward, backward = (PassTrace(**answer.pop(name)) for name in ("forward", "backward"))
    return AttentionTrace(forward=forward, backward=backward, **answer)


def main() -> None:
    """Answer until standard input ends."""
    with without_collections():
        from ultralong.planner.traces.attention import AttentionWorkload, trace_attention
    gc.freeze()  # nor are they looked through while it traces, or when it ends

    # Ctrl-C in a terminal, or a kernel's end, reaches this process too; the one that asks says when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not end up between answers
    for line in sys.stdin:
        values = json.loads(line)
        values["boundaries"] = None if values["boundaries"] is None else tuple(values["boundaries"])
        try:
            answer = asdict(trace_attention(AttentionWorkload(**values)))
        except Exception as error:  # noqa: BLE001 - it is raised again in the other process
            if not isinstance(error, ValueError):
                traceback.print_exc()
            answer = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
