"""The command `ultralong`, also as `python -m ultralong`.

The imports of a command take tenths of a second. Python would answer a Ctrl-C in them with a traceback of whatever it
was importing, or a library would take it for a missing module.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def _leave(number: int, frame: object) -> NoReturn:
    try:
        os.write(2, b"ultralong: stopped.\n")
    finally:
        os._exit(130)  # nothing was begun: an exception could be lost in an import


def main() -> None:
    """Run the command line; a Ctrl-C ends it with one line and exit code 130, also while it is imported.

    Raises:
        SystemExit: As `ultralong.cli.main`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # where it is ignored (nohup) it stays so
        signal.signal(signal.SIGINT, _leave)
    from ultralong.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
