"""Commands over many tests at once: a run and its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave
from ultralong.utils.hub import find_checkpoint

if TYPE_CHECKING:
    from ultralong.evaluation.runs.settings import RunSettings


@takes(
    wanted=Group(
        "ultralong.evaluation.runs.settings:RunSettings",
        positional=("tasks", "model"),
        names={"kv_dtype": "kv"},
        commas=("tasks",),
    )
)
def run(wanted: RunSettings, *, out: Path, before: Path | None = None, device: str = "auto", json: Json = None) -> None:
    """Measure a model on any of the tests, and write a report: JSON and one page.

    Stop it at any time; the same command resumes where it stopped.

    Tests are named with commas between them; groups are ruler, niah, infinitebench, infinitebench_synthetic,
    infinitebench_published, lveval, lveval_16k to lveval_256k, babilong_style, nonliteral, needle (the map),
    perplexity, loss and lm_eval (short benchmarks).

    Examples:
      ultralong eval run needle,ruler,babilong_style model --lengths 4k 32k 128k --samples 50 --out runs/model
      ultralong eval run lveval,infinitebench model --lengths 128k --data published --out runs/model
      ultralong eval run ruler model --lengths 1m --gpus 2 --out runs/long

    Args:
        wanted: What to measure.
        out: Folder of answers and report.
        before: Folder of a run of the model before, to set beside it.
        device: auto, cpu or cuda.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.runs.run import run as measure

    wanted = replace(wanted, model=find_checkpoint(wanted.model))
    result = measure(wanted, out, before=before, device=device, draw=False)
    if result is None:  # one of torchrun's other processes
        return
    leave(json, result)
    _tell(result, out)


def report(folder: Positional[Path], /, *, before: Path | None = None, json: Json = None) -> None:
    """Write the report of a run anew from its answers, without the model.

    With --before, two models side by side.

    Example: ultralong eval report runs/after --before runs/before

    Args:
        folder: Folder that eval run wrote.
        before: The same for the model before.
        json: Write the report's numbers as JSON to this file.
    """
    from ultralong.evaluation.runs.results import write_results

    result = write_results(folder, before, draw=False)
    leave(json, result)
    _tell(result, folder)


def _tell(result: dict[str, Any], out: Path) -> None:
    from ultralong.evaluation.report.run_page import draw_run
    from ultralong.evaluation.report.table import table_lines

    print("\n".join(table_lines(result)), flush=True)
    print(f"{draw_run(result, out)}")
