"""Start a training run on several processes of this machine: torchrun, with settings that a shared machine needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ultralong.utils.processes import ChildFailed

STOP_SECONDS = 20  # what ranks get to finish their step and save, before they and their agent are killed


def launch_local(
    config: str | os.PathLike[str], processes: int, resume: bool = False, quiet: bool = False, command: str = "train"
) -> None:
    """Run `ultralong train CONFIG` (or `ultralong sft CONFIG`) on `processes` processes of this machine, and wait.

    One process is a fresh interpreter all the same, so that what the run leaves behind (process groups, thread counts,
    CUDA memory) cannot reach the caller. The processes end when the caller does, however it ends: where it can still
    tell them, they finish their step and save, for which the environment's STOP_SECONDS (20) gives them time.

    Args:
        config: A settings file, see `TrainConfig`.
        processes: Number of processes.
        resume: Resume from the newest checkpoint.
        quiet: No progress bar.
        command: `train`, or `sft`, which refuses rows of documents.

    Raises:
        ultralong.utils.processes.ChildFailed: The run failed; its own message went to standard error.
    """
    patience = int(os.environ.get("STOP_SECONDS", STOP_SECONDS))  # as in the scripts of `ultralong.launch`
    threads = max(1, (os.cpu_count() or 1) // processes)
    words = [sys.executable, "-m", "ultralong.launch.agent", str(os.getpid()), str(processes)]
    words += [command, str(config), *(["--resume"] if resume else []), *(["--quiet"] if quiet else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    # Freed blocks of a long row are of many sizes; segments that grow let one be used for the next.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(patience))
    # The agent leads a session of its own: a Ctrl-C of the terminal reaches this process alone, which then stops it.
    process = subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        with _ended_by_signals():
            code = process.wait()
    except BaseException:
        _stop(process, patience)
        raise
    if code:
        code = code if code > 0 else 128 - code
        raise ChildFailed(f"Training stopped with exit code {code}; its own message is above.", code)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit, so that what was started is ended before this process is.

    Signals with a handler of the caller's, or ignored as under nohup, stay as they are.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # where handlers can be set
    names = [name for name in ("SIGTERM", "SIGHUP") if main and hasattr(signal, name)]
    changed = [number for name in names if signal.getsignal(number := signal.Signals[name]) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End an agent and its ranks, which may save first, within so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
