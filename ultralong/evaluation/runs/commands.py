"""What the short commands ask of `run`: a needle map, perplexity, answers of a few tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.report.table import table_lines
from ultralong.evaluation.runs.records import answer_tasks
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.inference.engines import Engine

PREFILL_CHUNK = 16384
NEEDLE_GRID = (9, 5)  # a short control and eighths of the window


def answer(
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    out: str | os.PathLike[str],
    haystack: str | os.PathLike[str] | None,
    chunk: int | None,
    batch: int | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine | None,
) -> dict[str, Any]:
    """`records.answer_tasks` with its arguments in the order that `sharded_engine.with_model` fills."""
    return answer_tasks(
        model,
        tokenizer,
        tasks,
        lengths,
        samples,
        seed,
        out,
        engine=engine,
        chunk=PREFILL_CHUNK if chunk is None else chunk,
        batch=batch,
        haystack=read_haystack(haystack),
    )


def measure_one(
    task: str,
    model: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 5,
    seed: int = 0,
    haystack: str | os.PathLike[str] | None = None,
    rows: str | os.PathLike[str] | None = None,
    max_rows: int = 16,
    device: str = "auto",
    out: str | os.PathLike[str] | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """A run of one measure: the same as `ultralong eval run TASK MODEL`, with a small map as its default.

    Args:
        task: `needle`, `perplexity` or `loss`.
        model: Folder or hub id.
        lengths: needle: tokens of the prompts; a short one and eighths of the model's window when empty.
        depths: needle: fractions from 0 (first) to 1 (last).
        samples: needle: prompts a cell.
        seed: Seed of the prompts, and of the bootstrap.
        haystack: needle: text file or folder to hide the needle in; None is repeated filler.
        rows: perplexity and loss: folder of packed rows.
        max_rows: perplexity and loss: rows to use.
        device: `auto`, or any of torch's.
        out: Folder of the run; None keeps nothing.
        **asked: needle: `engine`, `endpoint`, `endpoint_model` and `key_variable`, as in `RunSettings`.

    Returns:
        What `run` returns.

    Raises:
        ValueError: An unknown measure, or what `run` refuses.
    """
    if task not in ("needle", "perplexity", "loss"):
        raise ValueError(f"There is no evaluation {task!r}: use needle, perplexity or loss.")
    wanted = RunSettings(
        str(model),
        (task,),
        tuple(lengths),
        grid=NEEDLE_GRID,
        grid_samples=samples,
        needle_lengths=tuple(lengths),
        needle_depths=tuple(depths),
        seed=seed,
        haystack=None if haystack is None else str(haystack),
        rows=None if rows is None else str(rows),
        max_rows=max_rows,
        beyond_window=True,
        **asked,
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = run(wanted, Path(scratch) / "run" if out is None else out, device=device, draw=out is not None)
    assert result is not None, "one process measures"
    return result


def summary(result: dict[str, Any]) -> str:
    """What `measure_one` found, as a text table."""
    return "\n".join(table_lines(result))
