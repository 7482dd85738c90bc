"""Result files of measurements: one writer, one reader.

A file holds `machine` (hardware, versions, date), what else the measurement says of itself (`options`, `flop_rule`),
and `rows`, one for each case. Two older forms are read as well: attention files of 0.3 and before, whose rows are under
`results`, and files of rates, whose rows are lists by name under `rates`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, write_json

Row = dict[str, Any]
KERNELS = {"flash4": "flash-attn 4", "cudnn": "cuDNN", "flash": "torch flash"}  # as tables name them


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
    last_row(path)(row)


def last_row(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """A function that puts a row behind those that a result file has now, each time in the place of the row before."""
    before = read_json(path) if path.exists() else {}

    def put(row: Mapping[str, Any]) -> None:
        write_json(path, {**before, "rows": [*before.get("rows", ()), dict(row)]})

    return put


def rows_of(recorded: Mapping[str, Any]) -> list[Row]:
    """The rows of a result file's content, in any of the forms named above.

    Raises:
        ValueError: It holds none.
    """
    for key in ("rows", "results"):
        if isinstance(recorded.get(key), list) and all(isinstance(row, dict) for row in recorded[key]):
            return list(recorded[key])
    if isinstance(recorded.get("rates"), dict):
        return [{"rate": name, **row} for name, rows in recorded["rates"].items() for row in rows]
    raise ValueError(f"no rows were found; the file has {', '.join(recorded) or 'nothing'}")


def all_rows(recorded: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of result files, one file's after the other's."""
    return [row for file in recorded for row in rows_of(file)]


def markdown(head: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; none without rows.

    Args:
        head: Names of the columns, such as `model | GPUs | tokens`.
        rows: Cells of each row; those that a row lacks at its end are empty.
    """
    columns = head.count("|") + 1
    lines = [f"| {' | '.join([*map(str, cells), *[''] * (columns - len(cells))])} |" for cells in rows]
    return [f"| {head} |", "|---" * columns + "|", *lines] if lines else []


@dataclass(frozen=True)
class Facts:
    """What is known of who measured a row.

    Attributes:
        hardware: The GPU, or the processor of a measurement without one; empty where the file does not say.
        version: Of this library; empty where that was not recorded yet.
        commit: Of a checkout.
        torch: Its version.
        date: As YYYY-MM-DD.
    """

    hardware: str = ""
    version: str = ""
    commit: str = ""
    torch: str = ""
    date: str = ""

    def __str__(self) -> str:
        """One line, such as "0.4.0 at 0123456789ab, torch 2.11.0, NVIDIA H200, 2026-11-29"."""
        version = self.version or "version not recorded"
        named = f"{version} at {self.commit}" if self.commit else version
        return ", ".join(
            part for part in (named, self.torch and f"torch {self.torch}", self.hardware, self.date) if part
        )


def facts_of(recorded: Mapping[str, Any], row: Mapping[str, Any]) -> Facts:
    """Who measured a row: the row says it, or the head of its file."""
    said = recorded.get("machine")
    machine: Mapping[str, Any] = said if isinstance(said, dict) else {"device": said}  # one name in words
    versions = row.get("versions") or machine.get("packages") or {}
    hardware = str(row.get("gpu") or machine.get("device") or "")
    if hardware == "cpu":
        hardware = ", ".join(["cpu", *([str(machine["processor"])] if machine.get("processor") else [])])
    commit = str(versions.get("ultralong-commit", ""))
    date = str(row.get("date") or machine.get("date") or "")
    return Facts(hardware, str(versions.get("ultralong", "")), commit, str(versions.get("torch", "")), date)


def read_measured(path: Path) -> list[tuple[Row, Facts]]:
    """Rows with who measured them, of a result file, or of all result files of a folder, the oldest first.

    Args:
        path: A file, or a folder; what else lies in the folder is left out.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: The file is no result file, or the folder holds none.
    """
    if not path.is_dir():
        rows, recorded = read_rows(path), read_json(path)
        return [(row, facts_of(recorded, row)) for row in rows]
    found: list[tuple[Row, Facts]] = []
    for file in sorted(path.glob("*.json")):
        try:
            found += read_measured(file)
        except ValueError:
            continue  # a file of another kind: the folder of recorded results holds some
    if not found:
        raise ValueError(f"{path} holds no result file of `ultralong bench`")
    return sorted(found, key=lambda each: each[1].date)


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
