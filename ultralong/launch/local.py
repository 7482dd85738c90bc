"""Start a training run on several processes of this machine: torchrun, with settings that a shared machine needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from ultralong.utils.exits import ChildFailed


def launch_local(
    config: str | os.PathLike[str], processes: int, resume: bool = False, quiet: bool = False, command: str = "train"
) -> None:
    """Run `ultralong train CONFIG` (or `ultralong sft CONFIG`) on `processes` processes of this machine, and wait.

    One process is a fresh interpreter all the same, so that what the run leaves behind (process groups, thread counts,
    CUDA memory) cannot reach the caller. The processes end when the caller does, however it ends.

    Args:
        config: A settings file, see `TrainConfig`.
        processes: Number of processes.
        resume: Resume from the newest checkpoint.
        quiet: No progress bar.
        command: `train`, or `sft`, which refuses rows of documents.

    Raises:
        ultralong.utils.exits.ChildFailed: The run failed; its own message went to standard error.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    words = [sys.executable, "-m", "ultralong.launch.agent", str(processes)]
    words += [command, str(config), *(["--resume"] if resume else []), *(["--quiet"] if quiet else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    # Freed blocks of a long row are of many sizes; segments that grow let one be used for the next.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # The child leads its own group, so that stopping this process stops every rank and leaves none behind.
    process = subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if code:
        code = code if code > 0 else 128 - code
        raise ChildFailed(f"Training stopped with exit code {code}; its own message is above.", code)
