"""The process between `launch_local` and the ranks: torchrun's agent without its own report of a failure.

Where there is no GPU the agent imports the trainer and forks its ranks, which then start at once. A forked process
can't use CUDA: with a GPU each rank is an interpreter of its own. A rank that fails says why itself (see
`ultralong.cli.errors`); torchrun would add forty lines to that. What only the agent can know, that a rank was ended by
a signal, is said here in one line.
"""

from __future__ import annotations

import gc
import logging
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

from ultralong.utils.processes import end_with_parent, without_collections


def main(words: list[str]) -> int:
    """Run `ultralong` on several processes; returns the exit code.

    Args:
        words: Process id of the caller, number of processes, and the words of the command.
    """
    caller, processes, *command = words
    end_with_parent(int(caller), signal.SIGTERM)  # an agent has ranks to end
    if int(processes) == 1:
        sys.argv = ["ultralong", *command]
        runpy.run_module("ultralong", run_name="__main__", alter_sys=True)
        return 0
    with without_collections():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # --standalone takes a free port by itself, so that two runs on a machine do not meet.
    choices = ["--standalone", "--nproc-per-node", processes]
    ranks = [*_rank_words(), str(os.getpid()), *command]
    try:
        # Ranks of a failed run note here what was said. Without --log-dir torchrun makes such a folder and leaves it.
        with tempfile.TemporaryDirectory(prefix="ultralong-ranks-") as notes:
            run(parse_args([*choices, "--log-dir", notes, *ranks]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        cause = ", often because the host ran out of memory" if name == "SIGKILL" else ""
        print(f"ultralong {command[0]}: error: rank {rank} was ended by {name}{cause}.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _rank_words() -> list[str]:
    """How torchrun starts a rank; where it forks, what a rank imports is imported here."""
    import torch

    if torch.cuda.is_available():
        return ["-m", "ultralong.launch.rank"]
    with without_collections():
        import ultralong.training.loop  # noqa: F401
    gc.freeze()  # a collection in a rank would touch, and so copy, all of it
    return ["--start-method", "fork", "--run-path", str(Path(__file__).with_name("rank.py"))]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # as a command does before it ends
    sys.exit(code)
