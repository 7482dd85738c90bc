"""What a run's folder says: scores with counts and intervals, maps by depth, effective length, failures.

Everything is computed from the files that the run left, so a report can be made anywhere and at any time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.runs.records import EFFECTIVE_SCORE, compare_answers, effective_length
from ultralong.evaluation.tasks.groups import FAMILIES
from ultralong.evaluation.tasks.samples import TASKS, find_task
from ultralong.utils.files import read_json, read_jsonl, write_json, write_text

SETTINGS_FILE = "run.yaml"
DEPTHS = 5
MOST_FAILURES = 3  # of one test
LONGEST_QUOTE = 160
WRONG = 0.5  # below this score an answer is quoted as a failure
KIBI = 1024


def write_results(
    folder: str | os.PathLike[str], before: str | os.PathLike[str] | None = None, *, interactive: bool = True
) -> dict[str, Any]:
    """Write `report.json` and `report.html` of a run into its folder.

    Args:
        folder: Folder of the run.
        before: Folder of a run of the model before, to set beside it.
        interactive: True puts plotly's script into the page, so that figures can be explored offline.

    Returns:
        What `report.json` holds: `summarise`'s dictionary, and with `before` the same of that folder and `compared`.

    Raises:
        ValueError: A folder that holds no run.
    """
    folder = Path(folder)
    result = summarise(folder)
    if before is not None:
        result["before"] = summarise(before)
        try:
            result["compared"] = compare_answers(before, folder)
        except ValueError as error:
            result["compared"], result["not_compared"] = [], str(error)
    write_json(folder / "report.json", result)
    # Drawing needs packages that a machine in a cluster may lack: the numbers are safe by now.
    from ultralong.evaluation.report.run_page import render_run

    write_text(folder / "report.html", render_run(result, interactive=interactive))
    return result


def summarise(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a run's files say.

    Returns:
        `settings`, `environment`, `window` (tokens, or None), `skipped` (test to reason); `scores`, one a test and
        length (`task`, `family`, `length`, `n`, `score`, `low`, `high`, `seconds`, `cut`: samples that lost their
        middle); `families`, one a family and length (`family`, `length`, `tasks`, `n`, `score`, `low`, `high`);
        `effective` (RULER's: `length`, `bar`, `tasks`; None without RULER); `paper_means` (RULER as the paper averages
        it); `needle` (cells), `depths` (cells of all tests that hide something at a depth), `failures`, `perplexity`,
        `standard` and `sources` (family to texts).

    Raises:
        ValueError: The folder holds no run.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} holds no run: give the --out of `ultralong eval run`.")
    records = dict(_answers(folder))
    environment = read_json(folder / "environment.json") if (folder / "environment.json").exists() else {}
    scores = [
        _score(task, length, found)
        for (task, length), found in sorted(
            records.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0][1])
        )
    ]
    families = _families(scores)
    ruler = [item for item in families if item["family"] == "RULER"]
    effective = (
        {"length": effective_length(ruler), "bar": EFFECTIVE_SCORE, "tasks": min(item["tasks"] for item in ruler)}
        if ruler
        else None
    )
    sources: dict[str, list[str]] = {}
    for (task, _), found in records.items():
        kept = sources.setdefault(FAMILIES.get(task, task), [])
        kept += [source for source in dict.fromkeys(record["source"] for record in found) if source not in kept]
    cells = _last_cells(read_jsonl(folder / "needle.jsonl")) if (folder / "needle.jsonl").exists() else []
    return {
        "folder": str(folder),
        "settings": yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8")),
        "window": environment.pop("window", None),
        "skipped": environment.pop("skipped", {}),
        "environment": environment,
        "scores": scores,
        "families": families,
        "effective": effective,
        "paper_means": paper_means(ruler),
        "needle": cells,
        "depths": _depths(records),
        "failures": [
            failure for (task, length), found in sorted(records.items()) for failure in _failures(task, length, found)
        ],
        **{
            name: read_json(path) if (path := folder / f"{name}.json").exists() else None
            for name in ("perplexity", "standard")
        },
        "sources": sources,
    }


def _answers(folder: Path) -> Iterable[tuple[tuple[str, int], list[dict[str, Any]]]]:
    for path in sorted(folder.glob("*-*.jsonl")):
        match = re.fullmatch(r"(\w+)-(\d+)\.jsonl", path.name)
        if match is not None and match.group(1) in TASKS and (found := read_jsonl(path)):
            numbers = [record.get("index") for record in found]
            if numbers != list(range(len(found))):
                raise ValueError(
                    f"{path} holds samples {numbers}, where 0 to {len(found) - 1} belong: two runs wrote "
                    "to it. Delete the file and run again."
                )
            yield (match.group(1), int(match.group(2))), found


def _score(task: str, length: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scored = score_predictions(task, records)
    return {
        "task": task,
        "family": FAMILIES.get(task, task),
        "length": length,
        **{key: scored[key] for key in ("n", "score", "low", "high")},
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "cut": sum(record.get("cut", 0) > 0 for record in records),
    }


def _families(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for item in scores:
        groups.setdefault((item["family"], item["length"]), []).append(item)
    return [
        {
            "family": family,
            "length": length,
            "tasks": len(group),
            "n": sum(item["n"] for item in group),
            **mean_of_tasks(group),
        }
        for (family, length), group in groups.items()
    ]


def mean_of_tasks(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unweighted mean over tests, with an interval from theirs.

    The distances from estimate to end add up as squares (Zou and Donner 2008's method of variance estimates recovery),
    which keeps ends inside 0 to 100 and says something even where every answer was right.

    Args:
        group: `score`, `low` and `high` of each test.

    Returns:
        `score`, `low`, `high`; the ends are None where a test has none.
    """
    mean = sum(item["score"] for item in group) / len(group)
    if any(item["low"] is None for item in group):
        return {"score": mean, "low": None, "high": None}
    down, up = (
        math.sqrt(sum((item["score"] - item[end]) ** 2 for item in group)) / len(group) for end in ("low", "high")
    )
    return {"score": mean, "low": max(0.0, mean - down), "high": min(100.0, mean + up)}


def paper_means(ruler: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """RULER as the paper's columns average it: all powers of two from 4K up to 128K, 512K and 1M, equally.

    A column whose lengths were not all measured is left out.
    """
    by_length = {item["length"]: item["score"] for item in ruler}
    means = {}
    for top in (128, 512, 1024):
        wanted = [KIBI * 2**power for power in range(2, top.bit_length())]
        if all(length in by_length for length in wanted):
            means[f"RULER to {'1M' if top == KIBI else f'{top}K'}"] = float(np.mean([by_length[x] for x in wanted]))
    return means


def _last_cells(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One cell a length and depth: a later one, with other samples, takes the place of an earlier."""
    kept = {(cell["length"], cell["depth"]): dict(cell) for cell in cells}
    return [kept[key] for key in sorted(kept)]


def _depths(records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Cells of length and fifth of the depth, over all tests whose answer rests on one place."""
    cells: dict[tuple[int, int], list[float]] = {}
    for (task, length), found in records.items():
        grade = find_task(task).grade
        for record in found:
            if record.get("depth") is not None and len(record.get("positions") or ()) == 1:
                fifth = min(int(record["depth"] * DEPTHS), DEPTHS - 1)
                cells.setdefault((length, fifth), []).append(grade(record))
    return [
        {"length": length, "depth": (fifth + 0.5) / DEPTHS, "n": len(grades), "correct": float(f"{sum(grades):.3g}")}
        for (length, fifth), grades in sorted(cells.items())
    ]


def _failures(task: str, length: int, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    grade = find_task(task).grade
    wrong = [record for record in records if grade(record) < WRONG][:MOST_FAILURES]
    return [
        {
            "task": task,
            "length": length,
            "index": record["index"],
            "depth": record.get("depth"),
            "expected": quote(" | ".join(record["outputs"])),
            "got": quote(record["prediction"]),
        }
        for record in wrong
    ]


def quote(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]} ..."
