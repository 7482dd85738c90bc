"""How each notebook is executed: `notebooks/ci.yml`, read into frozen settings and checked on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ultralong.utils.text_formats import read_yaml

NAME = "[0-9][0-9]_*.py"
NEEDS = ("cpu", "gpu")


@dataclass(frozen=True)
class Settings:
    """How one notebook is executed.

    Attributes:
        timeout: Seconds for the whole notebook; a cell that alone exceeds them is stopped.
        parameters: Values that replace those of its parameters cell; each has to be defined there.
        shared: The same from `defaults`, for those notebooks that define them.
        needs: "cpu", or "gpu" where it has nothing to show without one.
        expect: For each stored value the lowest and highest that is right.
    """

    timeout: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "cpu"
    expect: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def sources(folder: str | os.PathLike[str], names: Sequence[str] = ()) -> list[Path]:
    """The percent sources of a folder, in reading order.

    Args:
        folder: Where `NN_name.py` files are.
        names: Which ones, as `03_separator_packing` or just `03`; all when empty.

    Raises:
        ValueError: No sources there, or a name fits none or several.
    """
    found = sorted(Path(folder).glob(NAME))
    if not found:
        raise ValueError(f"{folder} holds no notebook sources ({NAME}). Run this in the root of the clone.")
    if not names:
        return found
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".py").removesuffix(".ipynb")
        fitting = [path for path in found if path.stem == stem or path.stem.split("_")[0] == stem]
        if len(fitting) != 1:
            known = ", ".join(path.stem for path in found)
            raise ValueError(f"{name!r} fits {len(fitting)} notebooks; there are: {known}.")
        chosen += fitting
    return chosen


def load_settings(folder: str | os.PathLike[str]) -> dict[str, Settings]:
    """Read `ci.yml`: one entry a notebook, over `defaults`.

    Returns:
        Settings by notebook name (without suffix).

    Raises:
        ValueError: An unknown key, a missing timeout, bounds that are not two rising numbers.
    """
    path = Path(folder) / "ci.yml"
    raw = read_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} has to be a mapping from notebook names to settings, found {type(raw).__name__}.")
    defaults = raw.pop("defaults", {})
    return {name: _parse(f"{path}: {name}", defaults, entry or {}) for name, entry in raw.items()}


def _parse(where: str, defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> Settings:
    known = {item.name for item in fields(Settings)} - {"shared"}
    for key in [*defaults, *entry]:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}; known are {', '.join(sorted(known))}.")
    merged = {**defaults, **entry}
    if not isinstance(merged.get("timeout"), int):
        raise ValueError(f"{where} needs `timeout`, in whole seconds; found {merged.get('timeout')!r}.")
    if merged.get("needs", "cpu") not in NEEDS:
        raise ValueError(f"{where}: `needs` is one of {', '.join(NEEDS)}; found {merged['needs']!r}.")
    expect = {}
    for name, bounds in merged.get("expect", {}).items():
        if not (isinstance(bounds, list) and len(bounds) == 2 and bounds[0] <= bounds[1]):
            raise ValueError(f"{where}: `expect` of {name} is [lowest, highest]; found {bounds!r}.")
        expect[name] = (bounds[0], bounds[1])
    return Settings(
        timeout=merged["timeout"],
        needs=merged.get("needs", "cpu"),
        expect=expect,
        parameters=entry.get("parameters", {}),
        shared=defaults.get("parameters", {}),
    )
