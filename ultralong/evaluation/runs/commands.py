"""What `ultralong eval` does: open a checkpoint, measure, leave numbers and a picture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.measures.perplexity import perplexity_by_position, position_edges
from ultralong.evaluation.runs.records import answer_tasks
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.inference.engines import Engine
from ultralong.inference.load_model import load_model_and_tokenizer
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import write_json

PREFILL_CHUNK = 16384


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
    """`records.answer_tasks` with its arguments in the order that `long_engine.with_model` fills."""
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


def default_lengths(window: int) -> tuple[int, ...]:
    """Eighths of the window."""
    return tuple(window * part // 8 for part in range(1, 9))


def measure(
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
) -> dict[str, Any]:
    """Measure a checkpoint.

    Args:
        task: `needle` or `perplexity`.
        model: Folder or hub id.
        lengths: needle: tokens of the prompts; eighths of the model's window when empty.
        depths: needle: fractions from 0 (first) to 1 (last).
        samples: needle: prompts a cell.
        seed: Seed of the prompts, and of the bootstrap.
        haystack: needle: text file or folder to hide the needle in; None is repeated filler.
        rows: perplexity: folder of packed rows.
        max_rows: perplexity: rows to use.
        device: `auto`, or any of torch's.
        out: Folder for `TASK.json` and `TASK.png`; None writes nothing.

    Returns:
        `task`, `model`, `window` (tokens), `cells` or `bins`, what they were measured with, and `environment`.

    Raises:
        ValueError: An unknown task, no checkpoint, no rows, or what the task itself refuses.
    """
    if task not in ("needle", "perplexity"):
        raise ValueError(f"There is no evaluation {task!r}: use needle or perplexity.")
    if task == "perplexity" and rows is None:
        raise ValueError("Perplexity needs packed rows to read: give --rows FOLDER, as written by `ultralong pack`.")
    texts = read_haystack(haystack)
    loaded, tokenizer = load_model_and_tokenizer(model, device)
    window = int(loaded.config.get_text_config().max_position_embeddings)
    result: dict[str, Any] = {"task": task, "model": str(model), "window": window, "seed": seed}
    if task == "needle":
        lengths = tuple(lengths) or default_lengths(window)
        _warn_beyond(max(lengths), window)
        result |= {
            "haystack": "repeated filler" if texts is None else "documents",
            "cells": needle_grid(loaded, tokenizer, lengths, depths, samples, seed, texts, chunk=_chunk(max(lengths))),
        }
    else:
        packed = PackedRows(rows)
        _warn_beyond(packed.length, window)
        chosen = [packed[index] for index in range(min(max_rows, len(packed)))]
        result |= {
            "rows": len(chosen),
            "bins": perplexity_by_position(
                loaded, chosen, position_edges(packed.length), chunk=_chunk(packed.length), seed=seed
            ),
        }
    result["environment"] = describe_environment()
    if out is not None:
        _leave(Path(out), result)
    return result


def summary(result: dict[str, Any]) -> str:
    """What `measure` found, as a text table: needles by length and depth, or perplexity by position."""
    if result["task"] == "perplexity":
        lines = [f"perplexity of {result['model']} by position, {result['rows']} rows (95% interval)"]
        return "\n".join(
            [
                *lines,
                *(
                    f"{bin['start']:>11,} to {bin['end']:>11,}  {bin['perplexity']:9.2f}  "
                    f"({bin['low']:.2f} to {bin['high']:.2f})"
                    for bin in result["bins"]
                ),
            ]
        )
    cells = {(cell["length"], cell["depth"]): f"{cell['correct']}/{cell['n']}" for cell in result["cells"]}
    lengths, depths = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    head = "     tokens" + "".join(f"{depth:>9.0%}" for depth in depths)
    rows = [f"{length:>11,}" + "".join(f"{cells[length, depth]:>9}" for depth in depths) for length in lengths]
    return "\n".join([f"needles found by {result['model']}, by length and depth", head, *rows])


def _chunk(length: int) -> int | None:
    """Prompts that fit into one pass go in one; longer ones in pieces, so that activations stay bounded."""
    return PREFILL_CHUNK if length > 2 * PREFILL_CHUNK else None


def _warn_beyond(length: int, window: int) -> None:
    if length > window:
        warnings.warn(
            f"{length:,} tokens are beyond the model's window of {window:,}: expect it to fail there, or "
            "extend it first (ultralong extend).",
            stacklevel=3,
        )


def _leave(folder: Path, result: dict[str, Any]) -> None:
    from ultralong import figures

    write_json(folder / f"{result['task']}.json", result)
    name = Path(result["model"]).name
    mark = {"base_window": result["window"], "window_name": "window"}
    figure = (
        figures.needle_heatmap(result["cells"], f"Needles found: {name}", **mark)
        if result["task"] == "needle"
        else figures.perplexity_curve({name: result["bins"]}, "Perplexity by position", **mark)
    )
    figures.save_png(figure, folder / f"{result['task']}.png")
