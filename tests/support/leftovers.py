"""What is left in a temporary folder."""

import time
from pathlib import Path

LONGEST = 60  # seconds for a removal that goes on without the process that made the files, on a busy machine


def left_in(folder: Path) -> list[str]:
    """What is left in a temporary folder that is not torch's own cache, which has a fixed name."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("torchinductor"))


def left_at_last(folder: Path) -> list[str]:
    """What is still left when a removal that another process is at has had its time."""
    until = time.monotonic() + LONGEST
    while (left := left_in(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    return left
