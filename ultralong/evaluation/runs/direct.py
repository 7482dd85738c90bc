"""What a run measures of a model without samples and answers: the needle map, perplexity and loss, benchmarks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.evaluation.measures.key_tokens import KeyRule
from ultralong.evaluation.measures.lm_eval import lm_eval_version, measure_lm_eval
from ultralong.evaluation.measures.longppl import longppl
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.measures.perplexity import perplexity_by_positions, position_edges
from ultralong.evaluation.measures.result import Result, perplexity_result, write_measurements
from ultralong.evaluation.measures.row_loss import open_for_loss, row_loss
from ultralong.evaluation.runs.settings import RunSettings, within_window
from ultralong.evaluation.tasks.needle import prepare_haystack
from ultralong.inference.batched import batch_that_fits
from ultralong.inference.engines import Engine
from ultralong.inference.load import load_model
from ultralong.utils.files import append_jsonl, read_jsonl, write_json
from ultralong.utils.progress import progress

CONTROL = 1024  # the needle map's first column, where the published one has the length 0
LONGEST_BENCHMARK = 8192  # tokens of a benchmark's prompt, worked examples included, and its answer
MOST_BENCHMARK = 64  # samples together, as lm-eval's own limit has it
TOGETHER = 4096  # tokens of the longest prompts of which several depths are asked in one pass


def grid_lengths(count: int, longest: int) -> list[int]:
    """Evenly spaced lengths up to the longest; the first, which would be 0, becomes a short control."""
    spaced = [round(length) for length in np.linspace(0, longest, count)][1:] if count > 1 else [longest]
    control = [min(CONTROL, spaced[0] // 2)] if count > 1 else []
    return [*control, *spaced]


def grid_axes(wanted: RunSettings, longest: int, window: int) -> tuple[list[int], list[float]]:
    """Lengths and depths of the needle map: those named, or evenly spaced ones."""
    lengths = grid_lengths(wanted.grid[0], longest)
    if wanted.needle_lengths:
        told = set(wanted.needle_lengths) <= set(wanted.lengths)  # the run has warned of them
        lengths = within_window(wanted.needle_lengths, window, wanted.beyond_window, quiet=told)
    if wanted.needle_depths:
        return lengths, [float(depth) for depth in wanted.needle_depths]
    return lengths, [float(depth) for depth in np.linspace(0, 1, wanted.grid[1])] if wanted.grid[1] > 1 else [0.5]


def measure_grid(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    wanted: RunSettings,
    axes: tuple[Sequence[int], Sequence[float]],
    texts: Sequence[str] | None,
    path: Path,
    engine: Engine | None = None,
    *,
    quiet: bool = False,
) -> None:
    """The needle map, cell by cell, into a file of JSON lines; cells that are there are kept.

    Answers are read off the model's own forward pass, or decoded by an engine that has the model to itself.

    Args:
        model: The model; None where an engine answers.
        tokenizer: Its tokenizer.
        wanted: Samples of a cell, seed, chat, chunk.
        axes: Lengths and depths.
        texts: What to hide in; None is repeated filler.
        path: The file.
        engine: What answers instead of the model.
        quiet: True draws no progress bar.

    Raises:
        ValueError: As for `needle_grid`.
    """
    lengths, depths = axes
    haystack = prepare_haystack(tokenizer, texts, max(lengths))
    total = sum(lengths) * len(depths)
    with progress(total=total, desc="needle map", unit="tok", unit_scale=True, quiet=quiet) as bar:
        done = {(cell["length"], cell["depth"], cell["n"]) for cell in (read_jsonl(path) if path.exists() else ())}
        for length in lengths:
            missing = [depth for depth in depths if (length, depth, wanted.grid_samples) not in done]
            bar.update(length * (len(depths) - len(missing)))
            # A short prompt's depths share a pass; a long one's cells are kept one by one, for a stop in between.
            size = len(missing) if length <= TOGETHER else 1
            for first in range(0, len(missing), max(size, 1)):
                cells = needle_grid(
                    model,
                    tokenizer,
                    [length],
                    missing[first : first + size],
                    wanted.grid_samples,
                    wanted.seed,
                    haystack,
                    chat=wanted.chat,
                    engine=engine,
                    capacity=max(lengths),
                    chunk=wanted.chunk_for(length),
                    quiet=True,
                )
                for cell in cells:
                    append_jsonl(path, {**cell, "haystack": haystack.name})
                    bar.update(length)


def measure_rows(
    names: Sequence[str],
    model: PreTrainedModel,
    wanted: RunSettings,
    window: int,
    out: Path,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Perplexity, LongPPL and loss on packed rows, where they are asked for and not there yet.

    Perplexity is taken by position in the row and by distance from the start of the token's own document; the loss as
    training takes it, with parameters in float32.

    Args:
        names: What the run measures.
        model: The model.
        wanted: Rows, chunk, seed.
        window: The model's window; longer rows are read with a warning.
        out: Folder of the run.
        device: As for `run`.
        quiet: True draws no progress bar.

    Raises:
        ValueError: As for `PackedRows`, `longppl` and `row_loss`.
    """
    missing = [
        name for name in ("perplexity", "longppl", "loss") if name in names and not (out / f"{name}.json").exists()
    ]
    if not missing:
        return
    packed = PackedRows(Path(wanted.rows or ""))
    if packed.length > window:
        warnings.warn(
            f"{packed.length:,} tokens of a row are beyond the model's window of {window:,}: expect it to fail there, "
            "or extend it first (ultralong extend).",
            stacklevel=3,
        )
    if "perplexity" in missing:
        rows = [packed[index] for index in range(min(wanted.max_rows, len(packed)))]
        edges, chunk = position_edges(packed.length), wanted.chunk_for(packed.length)
        bins_by = perplexity_by_positions(model, rows, edges, chunk=chunk, seed=wanted.seed, quiet=quiet)
        results = [perplexity_result(bins, by) for by, bins in bins_by.items()]
        write_measurements(out / "perplexity.json", results)
    if "longppl" in missing:
        write_measurements(out / "longppl.json", [_longppl(model, packed, wanted, device, quiet)])
    if "loss" in missing:
        reader = model if model.dtype == torch.float32 else open_for_loss(wanted.model, device)
        found = row_loss(reader, packed, most=wanted.max_rows, quiet=quiet)
        write_measurements(out / "loss.json", [found.result(wanted.seed)])


def _longppl(model: PreTrainedModel, packed: PackedRows, wanted: RunSettings, device: str, quiet: bool) -> Result:
    own = wanted.evaluator in (None, wanted.model)
    return longppl(
        model,
        packed,
        KeyRule(wanted.short_context, wanted.short_stride, wanted.key_alpha, wanted.key_beta),
        evaluator=None if own else load_model(str(wanted.evaluator), device),
        evaluator_name=wanted.model if own else wanted.evaluator,
        by=wanted.texts,
        most=wanted.max_rows,
        chunk=wanted.chunk_for(packed.length),
        seed=wanted.seed,
        quiet=quiet,
    )


def measure_benchmarks(
    wanted: RunSettings,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    quiet: bool = False,
    release: bool = False,
) -> None:
    """lm-eval's short benchmarks into the run's folder; those of version 0.3 are found where it kept them.

    Args:
        wanted: Which, and how.
        model: The model, whose device is taken; None is a GPU.
        tokenizer: Says whether there is a chat template.
        out: Folder of the run.
        quiet: True draws no progress bar.
        release: Move the model off its GPU first, for good: lm-eval loads it again, in a process of its own.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: As for `measure_lm_eval`.
    """
    former = out / "standard"
    device, batch = "cuda" if model is None else model.device.type, _benchmark_batch(wanted, model)
    if release and model is not None:
        off_gpu(model)
    results, skipped = measure_lm_eval(
        wanted.model,
        former if former.is_dir() else out / "lm_eval",
        names=wanted.benchmarks,
        data=wanted.data,
        device=device,
        chat=bool(tokenizer.chat_template) if wanted.chat is None else wanted.chat,
        batch=batch,
        limit=wanted.limit,
        run_code=wanted.run_code,
        quiet=quiet,
    )
    found = {"results": [result.to_dict() for result in results], "skipped": skipped, "version": lm_eval_version()}
    write_json(out / "lm_eval.json", found)


def off_gpu(model: PreTrainedModel) -> None:
    """Move a model that is on one GPU to host memory, and give back what it and runners of it held there.

    Graphs of a runner that are still in use would read the weights where they were.
    """
    places = {parameter.device for parameter in model.parameters()}
    if len(places) == 1 and places != {torch.device("cpu")}:
        model.to("cpu")  # type: ignore[arg-type]  # wrapped by transformers without its types
        gc.collect()
        torch.cuda.empty_cache()


def _benchmark_batch(wanted: RunSettings, model: PreTrainedModel | None) -> int | None:
    """Samples of a benchmark to ask together; None leaves it to lm-eval.

    lm-eval tries out texts as long as the model's window before it generates: with a long one only one fits.
    """
    if wanted.batch is not None or model is None or model.device.type == "cpu":
        return wanted.batch
    return min(MOST_BENCHMARK, batch_that_fits(model, LONGEST_BENCHMARK, None))
