"""A notebook executed with other parameters, as on a GPU, and what it found there kept as a result file.

The committed notebook is the CPU's. A run on other hardware leaves the executed notebook as it came, and one JSON file
like those of `notebooks/results/`: hardware, versions and date, and one row with the notebook, the parameters that
differ, its seconds, what each of its checks printed, and the values that it stored.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralong.notebook_tools.run import chosen_parameters, execute, parameter_names
from ultralong.notebook_tools.settings import Settings
from ultralong.notebook_tools.values import stored
from ultralong.utils.extras import require
from ultralong.utils.files import make_folder, write_json
from ultralong.utils.text_formats import read_yaml

LONGEST = 3600  # seconds of one cell: a GPU's cells train and measure


def changes_of(texts: list[str], path: Path) -> dict[str, Any]:
    """Parameters from the command line, such as `DEVICE=cuda` and `GPUS=2`.

    Args:
        texts: `NAME=VALUE` each; the value is read as YAML, so 2 is a number and false a boolean.
        path: The notebook's percent source, which must define every name.

    Raises:
        ValueError: A text has no `=`, or the notebook has no such parameter.
    """
    known = parameter_names(path)
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {text}: give NAME=VALUE; {path.stem} has {', '.join(known)}.")
        changes[name] = read_yaml(value)
    return changes


def record(path: Path, settings: Settings, changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Execute a notebook with other parameters; write `NAME.ipynb` and `NAME.json` into a folder.

    Args:
        path: The percent source. It is executed in its own folder.
        settings: Its entry in `ci.yml`; the bounds there are the CPU's and are not applied.
        changes: Parameters that replace those.
        folder: Where the two files go; it is made when missing. What the notebook hands on goes into `NAME/` there.

    Returns:
        The row of the JSON file. `error` in it is the failed cell's message, and empty when nothing failed.
    """
    from ultralong.utils.environment import machine_facts  # it imports torch, which other commands need not

    folder = make_folder(folder.resolve())
    own = {"OUT": str(folder / path.stem)} if "OUT" in parameter_names(path) else {}
    parameters = chosen_parameters(path, settings) | own | dict(changes)
    failure = require("papermill", extra="notebooks").PapermillExecutionError
    kept, error, started = folder / f"{path.stem}.ipynb", "", time.perf_counter()
    try:
        execute(path, parameters, max(settings.timeout, LONGEST), keep=kept)
    except (failure, TimeoutError) as stopped:
        error = f"{getattr(stopped, 'ename', type(stopped).__name__)}: {getattr(stopped, 'evalue', stopped)}"
    row = {
        "notebook": path.stem,
        "parameters": {name: value for name, value in parameters.items() if name != "OUT"},
        "seconds": round(time.perf_counter() - started, 1),
        **_found(require("nbformat", extra="notebooks").read(kept, as_version=4)),
        "error": error,
    }
    write_json(folder / f"{path.stem}.json", {"machine": machine_facts(), "rows": [row]})
    return row


def _found(notebook: Any) -> dict[str, Any]:
    """What an executed notebook's checks printed, and what it stored."""
    checks = []
    for cell in notebook.cells:
        if "check" in cell.metadata.get("tags", ()):
            printed = "".join(each.get("text", "") for each in cell.outputs if each.output_type == "stream")
            checks += [line for line in printed.splitlines() if line.startswith("ok")]
    return {"checks": checks, "values": stored(notebook)}
