"""Functions that look at a folder and change nothing: are its files whole, and what will other programs read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultralong.api.names import Named, StrPath
from ultralong.utils.hub import unless_miniature
from ultralong.utils.processes import without_collections

if TYPE_CHECKING:
    from ultralong.checkpoints.check import Readings
    from ultralong.data.verify import Verification


def verify(folder: StrPath) -> Verification:
    """Compare the files of a folder with the sizes and hashes recorded in it. Nothing is changed.

    >>> found = verify("run")
    >>> print(found.faults)
    ()

    Args:
        folder: Packed rows or tokens, a run, one of its checkpoints, or a model.

    Returns:
        What was compared, and in `faults` a line for each file that is missing, cut or changed.

    Raises:
        ValueError: There is no such folder, or it is none of these.
    """
    from ultralong.data.verify import verify as run

    return run(folder)


def check(model: Named, revision: str | None = None) -> Readings:
    """What transformers 4 and 5, vLLM, SGLang and llama.cpp read from a checkpoint, and what they get wrong.

    >>> found = check("long")
    >>> print(found.window, found.readings[0].program, found.readings[0].version, found.readings[0].verdict)
    1024 transformers 4.46 wrong

    Args:
        model: Checkpoint folder, a hub id, or miniature (the model that ships).
        revision: Branch, tag or commit of a hub model.

    Returns:
        A reading for each program and version; `print` shows them as a table.

    Raises:
        ValueError: There is no such checkpoint, or its RoPE is none that this library reproduces.
    """
    with without_collections():
        from ultralong.checkpoints.check import check as run

    return run(unless_miniature(model), revision)
