"""What a run's folder says: results with counts and intervals, means of tests, effective length, failures.

Everything is computed from the files that the run left, so a report can be made anywhere and at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ultralong.evaluation.measures.capability import capability_means, curve_areas, mean_of_tasks
from ultralong.evaluation.measures.result import (
    Part,
    Result,
    benchmark_result,
    needle_result,
    perplexity_result,
    read_measurements,
)
from ultralong.evaluation.measures.score import EFFECTIVE_SCORE, effective_length, grades
from ultralong.evaluation.report.run_page import draw_run
from ultralong.evaluation.runs.answer_files import answer_files, task_results
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.tasks.groups import FAMILIES
from ultralong.utils.files import file_lock, read_json, read_json_object, read_jsonl, write_json
from ultralong.utils.text_formats import read_yaml

SETTINGS_FILE = "run.yaml"
PATIENCE = 600.0  # seconds to wait for another process that makes the report, which takes some
MOST_FAILURES = 3  # of one test
LONGEST_QUOTE = 160
WRONG = 0.5  # below this score an answer is quoted as a failure
KIBI = 1024


def write_results(
    folder: str | os.PathLike[str],
    before: str | os.PathLike[str] | None = None,
    *,
    interactive: bool = True,
    draw: bool = True,
) -> dict[str, Any]:
    """Write `results.json`, `report.json` and `report.html` of a run into its folder.

    Args:
        folder: Folder of the run.
        before: Folder of a run of the earlier model, to compare with.
        interactive: True puts plotly's script into the page, so that figures can be explored offline.
        draw: False writes the numbers alone; `draw_results` makes the page of them.

    A run may be under way in the folder: its answers so far are counted, and its own report comes later and has all.

    Returns:
        What `report.json` holds: `summarise`'s dictionary, and with `before` the same of that folder and `compared`.

    Raises:
        ValueError: A folder that holds no run.
    """
    folder = Path(folder)
    with _reporting(folder):
        result = summarise(folder)
        if before is not None:
            result["before"] = summarise(before)
            try:
                result["compared"] = compare_answers(before, folder)
            except ValueError as error:
                result["compared"], result["not_compared"] = [], str(error)
        write_json(folder / "results.json", result["results"])
        write_json(folder / "report.json", result)
        if draw:
            draw_run(result, folder, interactive=interactive)
    return result


def draw_results(folder: str | os.PathLike[str], *, interactive: bool = True) -> Path:
    """Write the page of the numbers that `write_results` left last in a folder, by this process or another.

    Raises:
        ValueError: A folder that holds no run.
    """
    folder = Path(folder)
    with _reporting(folder):
        return draw_run(read_json_object(folder / "report.json"), folder, interactive=interactive)


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Hold what is made from a run's answers, from reading them to the last file: who comes later has read later.

    Not the folder's own lock, which a run holds for hours: its report so far can be asked for meanwhile.

    Raises:
        ValueError: The folder holds no run, or its report has been held for too long.
    """
    _check_run(folder)
    busy = f"Another process has been writing the report of {folder} for {PATIENCE:g} s: end it, or try again."
    with file_lock(folder / ".report.lock", busy, remove=True, wait=PATIENCE):
        yield


def summarise(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a run's files say.

    Returns:
        `settings`, `environment`, `window` (tokens, or None), `skipped` (test to reason); `results`, each a `Result`
        as JSON values; `families`, one a family and length (`family`, `length`, `tasks`, `n`, `score`, `low`, `high`);
        `capabilities` and `areas`, as `capability_means` and `curve_areas` give them;
        `effective` (RULER's: `length`, `bar`, `tasks`; None without RULER); `paper_means` (RULER as the paper averages
        it); `failures` and `sources` (family to texts).

    Raises:
        ValueError: The folder holds no run.
    """
    folder = Path(folder)
    _check_run(folder)
    records = dict(_answers(folder))
    environment = read_json_object(folder / "environment.json") if (folder / "environment.json").exists() else {}
    scores = task_results(records)
    measured, skipped = read_measured(folder)
    families, capabilities = family_means(scores), capability_means(scores)
    ruler = [item for item in families if item["family"] == "RULER"]
    effective = (
        {"length": effective_length(ruler), "bar": EFFECTIVE_SCORE, "tasks": min(item["tasks"] for item in ruler)}
        if ruler
        else None
    )
    return {
        "folder": str(folder),
        "settings": _settings(folder / SETTINGS_FILE),
        "window": environment.pop("window", None),
        "skipped": environment.pop("skipped", {}) | skipped,
        "environment": environment,
        "results": [result.to_dict() for result in (*measured, *scores)],
        "families": families,
        "capabilities": capabilities,
        "areas": curve_areas(capabilities),
        "effective": effective,
        "paper_means": paper_means(ruler),
        "failures": [
            failure for (task, length), found in sorted(records.items()) for failure in _failures(task, length, found)
        ],
        "sources": _sources(records),
    }


def _check_run(folder: Path) -> None:
    """Refuse a folder that holds no run."""
    if not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} holds no run: give the --out of `ultralong eval run`.")


def _settings(path: Path) -> dict[str, Any]:
    """What was asked, as any version wrote it."""
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), str):
        raise ValueError(f"{path} holds no settings of a run (no model). Restore it.")
    return found


def read_measured(folder: Path) -> tuple[list[Result], dict[str, str]]:
    """Results of what is measured by other means than answers, and the reasons of benchmarks left out.

    Files of version 0.3 (`perplexity.json` with its bins by name, `standard.json`) are read as well.
    """
    results: list[Result] = []
    skipped: dict[str, str] = {}
    if (path := folder / "needle.jsonl").exists() and (cells := read_jsonl(path)):
        with _named(path):
            results.append(needle_result(cells))
    for name in ("perplexity", "longppl", "loss"):
        path = folder / f"{name}.json"
        if path.exists():
            found = read_json(path)
            with _named(path):
                results += (
                    [perplexity_result(bins, by) for by, bins in found.items() if bins]
                    if isinstance(found, dict)
                    else read_measurements(path)
                )
    for name in ("lm_eval", "standard"):
        path = folder / f"{name}.json"
        if path.exists():
            found = read_json_object(path)
            with _named(path):
                results += [
                    benchmark_result(values) if "score" in values else Result.from_dict(values)
                    for values in found.get("results") or found.get("scores") or ()
                ]
                skipped |= found.get("skipped", {})
            break
    return results, skipped


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file whose content is not of the shape that a run writes."""
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not of the shape that a run writes ({type(error).__name__}: {error}).") from error


def _answers(folder: Path) -> Iterable[tuple[tuple[str, int], list[dict[str, Any]]]]:
    for pair, path in answer_files(folder).items():
        if found := read_jsonl(path):
            numbers = [record.get("index") for record in found]
            if numbers != list(range(len(found))):
                raise ValueError(
                    f"{path} holds samples {numbers}, where 0 to {len(found) - 1} belong: two runs wrote "
                    "to it. Delete the file and run again."
                )
            yield pair, found


def _sources(records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = {}
    for (task, _), found in records.items():
        kept = sources.setdefault(FAMILIES.get(task, task), [])
        kept += [source for source in dict.fromkeys(record["source"] for record in found) if source not in kept]
    return sources


def family_means(scores: Sequence[Result]) -> list[dict[str, Any]]:
    """Unweighted means over the tests of each family at each length, with intervals; see `summarise`."""
    groups: dict[tuple[str, int], list[Part]] = {}
    for result in scores:
        for part in result.by_length:
            groups.setdefault((FAMILIES.get(result.task, result.task), part.length or 0), []).append(part)
    return [
        {
            "family": family,
            "length": length,
            "tasks": len(group),
            "n": sum(part.n for part in group),
            **mean_of_tasks(group),
        }
        for (family, length), group in groups.items()
    ]


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


def _failures(task: str, length: int, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    graded = zip(records, grades(task, records), strict=True)
    wrong = [record for record, grade in graded if grade < WRONG][:MOST_FAILURES]
    return [
        {
            "task": task,
            "length": length,
            "index": record["index"],
            "depth": record.get("depth"),
            "expected": quote(" | ".join(record["outputs"])),
            "got": quote(record["prediction"]),
            **({"id": record["id"], "asked": quote(record["question"])} if "questions_sha256" in record else {}),
        }
        for record in wrong
    ]


def quote(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]} ..."
