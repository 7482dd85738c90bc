"""Child processes: none outlives the process that started it, and what failed in one is told once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h


def end_with_parent(parent: int | None = None, how: signal.Signals = signal.SIGKILL) -> None:
    """Have this process receive a signal when the one that started it ends, by whatever cause. Linux only.

    Args:
        parent: Process id of the one that started this one. If it has ended by now the signal comes at once; with None
            an end before this call goes unnoticed.
        how: The signal. SIGKILL suits a process that has nothing to clean up.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, how)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), how)


class ChildFailed(RuntimeError):
    """Processes that this one started failed; their message went to standard error. `code` is their exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
