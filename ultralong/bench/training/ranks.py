"""Processes of a measurement: a module in torchrun, with a limit of time, and what its messages say where it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

GRACE = 60  # seconds that processes have to end when they are stopped


def start_ranks(gpus: int, module: str, *words: str, limit: float | None = None) -> dict[str, str]:
    """Run a module in so many processes.

    Args:
        gpus: Processes.
        module: What each of them runs.
        *words: Its arguments.
        limit: Seconds after which they are stopped.

    Returns:
        Nothing; where they failed or were stopped, why (`note`), and the end of what they wrote (`messages`).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    threads = str(max(1, (os.cpu_count() or 1) // (2 * gpus)))
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": threads}
    # Without --log-dir torchrun makes a folder and leaves it. A pipe would wait for the last process that holds it.
    with (
        tempfile.TemporaryDirectory(prefix="ultralong-ranks-", ignore_cleanup_errors=True) as notes,
        tempfile.TemporaryFile("w+", errors="replace") as written,
    ):
        command += ["--log-dir", notes, "-m", module, *words]
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=written)
        try:
            code = running.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(running)
        written.seek(0)
        messages = written.read()
    if code == 0:
        return {}
    note = f"stopped after its limit of {limit:g} s" if code is None else failure(messages) or f"exit code {code}"
    return {"note": note, "messages": messages[-4000:]}


def _stop(running: subprocess.Popen[bytes]) -> None:
    """End torchrun, if it has not ended: asked to, it ends its processes, which are in groups of their own."""
    if running.poll() is not None:
        return
    running.terminate()
    try:
        running.wait(GRACE)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def failure(messages: str) -> str:
    """The error of the first process that failed, without its traceback and what it was raised from; empty for none."""
    found = re.findall(
        r"^(\[rank\d+\]: )?(?!torch\.distributed\.elastic)((?:\w+\.)*\w+Error: .*)$", messages, re.MULTILINE
    )
    return next((text[:300] for rank, text in reversed(found) if rank == found[0][0]), "")
