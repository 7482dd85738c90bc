"""The committed baseline of a model before any extension: needles and RULER from 1K to past its window, in one JSON.

    python -m ultralong.evaluation.runs.baseline run MODEL --out runs/baseline --json report.json
    python -m ultralong.evaluation.runs.baseline collect --json baseline.json h200=report.json cpu=runs/cpu

`run` is `ultralong eval run` with the baseline's tests, for machines that lack the command line's packages; its folder
is resumed after a stop. `collect` puts runs under headings of one file, which keeps the headings that it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralong.evaluation.measures.score import grades
from ultralong.evaluation.report.page import model_label
from ultralong.evaluation.runs.answer_files import answer_files
from ultralong.evaluation.runs.results import summarise
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, read_jsonl, write_json

TESTS = ("needle", "ruler")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
GRID = (9, 5)  # up to 16,384: every 2,048 tokens, and 1,024
KEPT = (
    "settings",
    "window",
    "environment",
    "machine",
    "results",
    "families",
    "capabilities",
    "areas",
    "effective",
    "failures",
    "skipped",
    "sources",
)
# Of the settings, what says what was measured.
ASKED = ("model", "tasks", "lengths", "samples", "grid", "grid_samples", "seed", "chat", "engine", "kv_dtype")


def measure_baseline(wanted: RunSettings, out: Path, device: str = "auto", *, quiet: bool = False) -> dict[str, Any]:
    """Run, and return the run's summary with the machine and every sample's score.

    Raises:
        ValueError: As for `run`.
    """
    run(wanted, out, device=device, quiet=quiet)
    result = shortened(summarise(out) | {"machine": machine_facts()})
    files = answer_files(out)
    for found in result["results"]:
        if found["metric"] == "score":
            for part in found["by_length"]:
                records = read_jsonl(files[found["task"], part["length"]])
                part["details"]["each"] = [round(value, 4) for value in grades(found["task"], records)]
    return result


def shortened(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary without what names this machine's folders, and with one failure a test and length."""
    kept: dict[str, Any] = {key: summary[key] for key in KEPT if key in summary}
    settings = {key: value for key, value in summary["settings"].items() if key in ASKED}
    settings["model"] = model_label(settings["model"])
    data = str(summary["settings"].get("data") or "")
    if data:
        kept["skipped"] = {test: reason.replace(data, "the folder of data") for test, reason in kept["skipped"].items()}
    first: dict[tuple[str, int], Any] = {}
    for failure in summary["failures"]:
        first.setdefault((failure["task"], failure["length"]), failure)
    seconds = sum(
        part["details"].get("seconds", 0.0)
        for found in summary["results"]
        if found["metric"] == "score"
        for part in found["by_length"]
    )
    return kept | {"settings": settings, "answer_minutes": round(seconds / 60, 2), "failures": list(first.values())}


def collect(path: Path, runs: Mapping[str, Path], model: str | None = None) -> dict[str, Any]:
    """Put runs under their headings in a file, beside those that it has.

    Args:
        path: The file.
        runs: Heading to a run's folder, or to the JSON that `run` wrote.
        model: What the model is and where it came from, one sentence; None keeps the file's.

    Returns:
        What the file holds: `model` and `runs`.

    Raises:
        ValueError: A folder without a run, or a file that is none.
    """
    held: dict[str, Any] = read_json(path) if path.exists() else {"model": "", "runs": {}}
    for heading, place in runs.items():
        if place.is_dir():
            held["runs"][heading] = shortened(summarise(place))
            continue
        if not place.is_file():
            raise ValueError(f"{heading}={place}: there is no such folder or file.")
        found = read_json(place)
        if not {"results", "scores"} & found.keys():
            raise ValueError(f"{place} is not what `run` of this command writes.")
        held["runs"][heading] = found
    held["model"] = model or held["model"]
    write_json(path, held)
    return held


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ultralong.evaluation.runs.baseline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure")
    one.add_argument("model", help="folder or hub id")
    one.add_argument("--out", type=Path, required=True, help="folder of the run")
    one.add_argument("--json", type=Path, required=True, help="file for the summary")
    one.add_argument("--tests", nargs="+", default=list(TESTS))
    one.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    one.add_argument("--samples", type=int, default=20, help="of each test at each length")
    one.add_argument("--grid", type=int, nargs=2, default=list(GRID), help="needle map: lengths and depths")
    one.add_argument("--grid-samples", type=int, default=20, help="needle map: prompts a cell")
    one.add_argument("--data", help="folder with SQuAD's and HotpotQA's files, or package")
    one.add_argument("--no-chat", action="store_true", help="ask plainly, without the chat template")
    one.add_argument("--batch", type=int, help="short prompts to answer together")
    one.add_argument("--workers", type=int, default=0, help="processes that make samples ahead")
    one.add_argument("--device", default="auto")
    many = commands.add_parser("collect", help="put runs under headings of one file")
    many.add_argument("--json", type=Path, required=True, help="the file")
    many.add_argument("--model", help="what the model is and where it came from")
    many.add_argument("runs", nargs="+", metavar="HEADING=PLACE", help="a run's folder, or the JSON of `run`")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a sentence where something cannot be."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "collect":
            places = [words.partition("=") for words in asked.runs]
            collect(asked.json, {heading: Path(place) for heading, _, place in places}, asked.model)
            return
        wanted = RunSettings(
            asked.model,
            tuple(asked.tests),
            tuple(asked.lengths),
            asked.samples,
            tuple(asked.grid),
            asked.grid_samples,
            data=asked.data,
            batch=asked.batch,
            workers=asked.workers,
            chat=False if asked.no_chat else None,
            beyond_window=True,
            skip_missing=True,
        )
        result = measure_baseline(wanted, asked.out, asked.device)
        write_json(asked.json, result)
    except (ValueError, ImportError) as error:
        print(f"baseline: error: {error}", file=sys.stderr)
        sys.exit(1)
    for row in result["families"]:
        print(f"{row['family']:24} {row['length']:>9,}  {row['score']:6.1f}  n {row['n']}")
    print(f"{result['answer_minutes']} minutes of answering; left out: {', '.join(result['skipped']) or 'nothing'}")


if __name__ == "__main__":
    main()
