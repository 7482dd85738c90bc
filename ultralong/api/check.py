"""Functions that look at a folder and change nothing: are its files whole, and what will other programs read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ultralong.data.verify import Verification

    StrPath: TypeAlias = str | os.PathLike[str]


def verify(folder: StrPath) -> Verification:
    """Compare the files of a folder with the sizes and hashes recorded in it. Nothing is changed.

    >>> found = verify("run")
    >>> print(found.faults)
    ()

    Args:
        folder: Packed rows or a token store; a run with its checkpoints and model; one training checkpoint; a model.

    Returns:
        What was compared, and in `faults` a line for each file that is missing, cut or changed.

    Raises:
        ValueError: There is no such folder, or it is none of these.
    """
    from ultralong.data.verify import verify as run

    return run(folder)
