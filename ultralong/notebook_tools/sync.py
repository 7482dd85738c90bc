"""Take a source's new text over into its executed notebook, where no output can have changed.

Executing a notebook takes a minute. Words and comments change more often than code, and change no output: their
notebooks need not run again.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from ultralong.notebook_tools.run import read_source
from ultralong.utils.extras import require


def sync(path: str | os.PathLike[str]) -> Any:
    """The notebook of a percent source, with its words and comments and with the outputs of the executed file.

    Args:
        path: The percent source; the executed notebook lies beside it.

    Returns:
        The notebook, ready to be written.

    Raises:
        ValueError: A code cell does something else than the one that was executed.
    """
    nbformat = require("nbformat", extra="notebooks")
    source = read_source(path)
    executed = nbformat.read(Path(path).with_suffix(".ipynb"), as_version=4)
    cells, ran = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (source, executed))
    changed = [new.source for new, old in zip(cells, ran, strict=False) if _meaning(new) != _meaning(old)]
    if changed or len(cells) != len(ran):
        where = repr(changed[0].splitlines()[0]) if changed else f"{len(cells)} cells, {len(ran)} were executed"
        raise ValueError(f"{Path(path).name} has other code than its notebook, from {where}: run `make notebooks`.")
    for new, old in zip(cells, ran, strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    return source


def _meaning(cell: Any) -> str:
    """What a code cell does: its syntax tree, which holds no comments and no line breaks."""
    return ast.dump(ast.parse(cell.source))
