"""Values a notebook hands to its test: stored in an output of the notebook itself, so there is no second file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralong.utils.extras import require

MIME = "application/vnd.ultralong.values+json"


def store(**values: float | int | str | bool) -> None:
    """Record what this notebook found, to be checked against the bounds in `notebooks/ci.yml`.

    Outside of IPython the values are printed.

    Args:
        **values: Names and plain values. Convert tensors and arrays with `float()` or `int()` first.

    Raises:
        ValueError: A value is not a plain number, string or boolean.
    """
    for name, value in values.items():
        if type(value) not in (float, int, str, bool):
            kind = type(value).__name__
            raise ValueError(f"store({name}=...) got a {kind}: convert it with float(), int() or str().")
    text = ", ".join(
        f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}" for name, value in values.items()
    )
    ipython = require("IPython", extra="notebooks")
    if ipython.get_ipython() is None:
        print(text)
        return
    ipython.display.display({MIME: values, "text/plain": text}, raw=True)


def stored(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the cells of an executed notebook stored; a later value replaces an earlier one of its name.

    Args:
        notebook: A notebook in nbformat 4, as `nbformat.read` gives it.
    """
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            found.update(output.get("data", {}).get(MIME, {}))
    return found
