"""Result files of measurements: one writer, one reader.

A file holds `machine` (hardware, versions, date), what else the measurement says of itself (`options`, `flop_rule`),
and `rows`, one for each case. Two older forms are read as well: attention files of 0.3 and before, whose rows are under
`results`, and files of rates, whose rows are lists by name under `rates`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, write_json

Row = dict[str, Any]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Write a result file, replacing what is there.

    Args:
        path: JSON file.
        rows: One mapping of JSON values for each case.
        **about: What else the file says of the measurement, such as `options` and `flop_rule`.
    """
    write_json(path, {"machine": machine_facts(), **about, "rows": [dict(row) for row in rows]})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a result file; the rows before it, and what the file says of itself, stay."""
    before = read_json(path) if path.exists() else {}
    write_json(path, {**before, "rows": [*before.get("rows", ()), dict(row)]})


def rows_of(recorded: Mapping[str, Any]) -> list[Row]:
    """The rows of a result file's content, in any of the forms named above.

    Raises:
        ValueError: It holds none.
    """
    for key in ("rows", "results"):
        if isinstance(recorded.get(key), list):
            return list(recorded[key])
    if isinstance(recorded.get("rates"), dict):
        return [{"rate": name, **row} for name, rows in recorded["rates"].items() for row in rows]
    raise ValueError(f"no rows were found; the file has {', '.join(recorded) or 'nothing'}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or holds no rows.
    """
    try:
        recorded = read_json(path)
        if not isinstance(recorded, dict):
            raise ValueError("no rows were found")
        return rows_of(recorded)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a result file of `ultralong bench`: {error}") from error
