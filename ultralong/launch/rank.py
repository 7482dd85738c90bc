"""A rank of `launch_local`: the command `ultralong` in a process that ends when its agent does.

torchrun gives each rank a session of its own, so that a signal to the agent's group does not reach it.
"""

from __future__ import annotations

import runpy
import sys

from ultralong.utils.processes import end_with_parent


def main(words: list[str]) -> None:
    """Run `ultralong` with the words after the first, which is the agent's process id."""
    agent, *command = words
    end_with_parent(int(agent))
    sys.argv = ["ultralong", *command]
    runpy.run_module("ultralong", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
