"""The process between `launch_local` and the ranks: torchrun's agent without its own report of a failure.

A rank that fails says why itself (see `ultralong.cli.errors`); torchrun would add forty lines to that. What only the
agent can know, that a rank was ended by a signal, is said here in one line.
"""

from __future__ import annotations

import gc
import logging
import os
import runpy
import signal
import sys

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

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # --standalone takes a free port by itself, so that two runs on a machine do not meet.
    started = ["-m", "ultralong.launch.rank", str(os.getpid()), *command]
    options = parse_args(["--standalone", "--nproc-per-node", processes, *started])
    try:
        run(options)
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


if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # as a command does before it ends
    sys.exit(code)
