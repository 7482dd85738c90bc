"""Remove a folder when this process's standard input ends: `python -I -S remove_after.py FOLDER < PIPE`.

It imports nothing but the standard library, so that it starts at once and is small while it waits.
"""

import shutil
import sys
import time
from pathlib import Path

TRIES = 100  # a process that was told to end may still write for a moment
PAUSE = 0.1  # seconds between two tries


def main(folder: Path) -> int:
    """Wait for the end of standard input, then remove the folder; 1 where some of it is still there."""
    sys.stdin.buffer.read()
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)  # tried again: what is left is seen by its being there
        if not folder.exists():
            return 0
        time.sleep(PAUSE)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
