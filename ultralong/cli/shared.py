"""What the commands share: where numbers go, and who speaks when several processes run one command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ultralong.utils.files import write_json

Json = Annotated[Path | None, arg(metavar="FILE")]
File = Annotated[Path, arg(metavar="FILE")]


def is_main() -> bool:
    """True on the process that prints and writes: the first under torchrun, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(path: Path | None, value: Any) -> None:
    """Write the numbers of a command where they were asked for."""
    if path is not None and is_main():
        write_json(path, value)
