"""Where a notebook's files go: the folder that `OUT` names, or a temporary one that is gone when the kernel is.

A kernel ends in many ways: it is shut down, it is killed in the middle of a cell, the host runs out of memory. So it is
not the kernel that removes its folder but a small process beside it, which waits for the kernel's end, whatever the
cause.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from ultralong.utils.files import make_folder

PREFIX = "ultralong-notebook-"
REMOVER = Path(__file__).with_name("remove_after.py")
GRACE = 3.0  # seconds that the kernel's end waits for the removal; Jupyter kills a kernel that takes 5 to end

_removers: list[subprocess.Popen[bytes]] = []  # of the kernel's temporary folder: one, or none


def output_folder(out: str) -> Path:
    """The folder for what a notebook makes; one printed line says where it is and whether it stays.

    Args:
        out: The notebook's parameter `OUT`. A name: that folder, made where it is missing, and kept. Empty: a new
            temporary folder. It is removed when the kernel has ended and so have the processes that it forked, or when
            this is called again, as by a cell that is run twice.

    Returns:
        The folder, as an absolute path where it is a temporary one.

    Raises:
        ValueError: `out` names a file.
    """
    _end()
    if out:
        folder = make_folder(Path(out).expanduser())
        print(f"Files go to {folder}.")
        return folder
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    _removers.append(
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(REMOVER), str(folder)],
            stdin=subprocess.PIPE,  # the system closes it when the last process that holds it ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder.parent,
            start_new_session=True,  # Jupyter's interrupt goes to the kernel's whole group
        )
    )
    print(f"Files go to {folder}, which is removed when the kernel ends; name a folder in OUT to keep them.")
    return folder


@atexit.register
def _end() -> None:
    """Let the temporary folder go, and wait until it is gone."""
    while _removers:
        remover = _removers.pop()
        assert remover.stdin is not None
        remover.stdin.close()
        # A forked process may still hold the pipe. Then the remover goes on waiting, without the kernel.
        with suppress(subprocess.TimeoutExpired):
            remover.wait(GRACE)
