"""A rank of `launch_local`: the command `ultralong` in a process that ends when its agent does.

A rank has a session of its own, so that a signal to the agent's group does not reach it. torchrun sees to that where
it starts an interpreter; a rank that was forked does it here, and puts down the agent's handlers of signals.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from ultralong.utils.processes import end_with_parent


def main(words: list[str]) -> None:
    """Run `ultralong` with the words after the first, which is the agent's process id."""
    agent, *command = words
    end_with_parent(int(agent))
    if os.getsid(0) != os.getpid():
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import torch

        torch.set_num_threads(torch.get_num_threads())  # a pool of its own: the agent's threads are not here
    sys.argv = ["ultralong", *command]
    runpy.run_module("ultralong", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
