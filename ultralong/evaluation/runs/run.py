"""`ultralong eval run`: make samples, let a model answer, score, report; stop it at any time, it goes on where it was.

A folder holds one run: `run.yaml` (what was asked), `TASK-LENGTH.jsonl` (answers, appended one by one), `needle.jsonl`
(cells of the grid, appended one by one), `perplexity.json`, `standard.json`, and the report, which is made from those
files alone and can be made again without the model (`ultralong eval report`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.measures.lm_eval import find_benchmarks, measure_standard
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.measures.needle_ask import ask_cell
from ultralong.evaluation.measures.perplexity import perplexity_by_position, position_edges
from ultralong.evaluation.runs.records import answer_pairs
from ultralong.evaluation.runs.results import SETTINGS_FILE, write_results
from ultralong.evaluation.runs.settings import RunSettings, doubled_lengths, within_window
from ultralong.evaluation.tasks.groups import SPECIAL, expand, find_questions
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.evaluation.tasks.needle import prepare_haystack
from ultralong.evaluation.tasks.samples import PUBLISHED, check_task
from ultralong.inference.engines import Engine, OwnEngine, VllmEngine
from ultralong.inference.load_model import load_model_and_tokenizer
from ultralong.inference.long_engine import with_model
from ultralong.utils import settings
from ultralong.utils.environment import describe_environment
from ultralong.utils.extras import require
from ultralong.utils.files import append_jsonl, locked, read_jsonl, write_json
from ultralong.utils.progress import progress

CONTROL = 1024  # the needle map's first column, where the published one has the length 0
FIXED = ("model", "seed", "chat", "haystack", "data", "rows", "engine", "kv_dtype")


def run(
    wanted: RunSettings,
    out: str | os.PathLike[str],
    *,
    before: str | os.PathLike[str] | None = None,
    device: str = "auto",
    opened: tuple[PreTrainedModel | None, PreTrainedTokenizerBase] | None = None,
    engine: Engine | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Do what is missing of a run, and report.

    Args:
        wanted: What to measure.
        out: Folder of the run.
        before: Folder of another run, of the model before, to set beside it.
        device: `auto`, or any of torch's.
        opened: The model and its tokenizer when they are open already.
        engine: What answers, when it is there already.
        quiet: True draws no progress bars.

    Returns:
        What `report.json` holds: see `results.summarise`. None on torchrun's other processes.

    Raises:
        ValueError: The folder holds another run; a test is unknown, misses its data or needs longer prompts; or no
            length lies within the window.
    """
    if opened is None and wanted.shared:
        return with_model(
            partial(_run_opened, wanted, out, before, quiet),
            wanted.model,
            gpus=wanted.gpus,
            kv=wanted.kv_dtype,
            chunk=wanted.chunk,
            device=device,
            quiet=quiet,
        )
    out = Path(out)
    names = expand(wanted.tasks)
    if "perplexity" in names and wanted.rows is None:
        raise ValueError("Perplexity needs packed rows to read: give --rows FOLDER, as written by `ultralong pack`.")
    if "standard" in names:
        find_benchmarks(wanted.benchmarks)
        require("lm_eval", "eval")
    check_same_run(wanted, out)
    texts = read_haystack(wanted.haystack)
    model, tokenizer = opened or _open(wanted, device)
    config = AutoConfig.from_pretrained(wanted.model) if model is None else model.config
    window = int(config.get_text_config().max_position_embeddings)
    lengths = within_window(wanted.lengths or doubled_lengths(window), window, wanted.beyond_window)
    pairs, questions, skipped = plan_pairs(names, lengths, tokenizer, wanted, texts)
    asked = replace(wanted, tasks=tuple(names), lengths=tuple(lengths))
    settings.save(asked, out / SETTINGS_FILE, "Repeat or go on with: ultralong eval run")
    write_json(out / "environment.json", {"window": window, "skipped": skipped, **describe_environment()})
    if "needle" in names:
        measure_grid(model, tokenizer, wanted, max(lengths), texts, out / "needle.jsonl", engine, quiet=quiet)
    if pairs:
        engine = _engine(wanted, model, tokenizer, max(lengths)) if engine is None else engine
        answer_pairs(
            engine,
            tokenizer,
            pairs,
            wanted.samples,
            wanted.seed,
            out,
            workers=wanted.workers,
            chat=wanted.chat,
            haystack=texts,
            questions=questions,
            quiet=quiet,
        )
    if "perplexity" in names and not (out / "perplexity.json").exists():
        write_json(out / "perplexity.json", _perplexity(model, wanted, quiet))
    if "standard" in names:
        chat = bool(tokenizer.chat_template) if wanted.chat is None else wanted.chat
        write_json(
            out / "standard.json",
            measure_standard(
                wanted.model,
                out / "standard",
                names=wanted.benchmarks,
                data=wanted.data,
                device="cuda" if model is None else model.device.type,
                chat=chat,
                limit=wanted.limit,
                run_code=wanted.run_code,
                quiet=quiet,
            ),
        )
    return write_results(out, before)


def _run_opened(
    wanted: RunSettings,
    out: str | os.PathLike[str],
    before: str | os.PathLike[str] | None,
    quiet: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine | None,
) -> dict[str, Any]:
    """`run` with its arguments in the order that `with_model` fills."""
    return run(wanted, out, before=before, opened=(model, tokenizer), engine=engine, quiet=quiet)


def _engine(
    wanted: RunSettings, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Engine:
    chunk = wanted.chunk_for(longest)
    if model is not None:
        return OwnEngine(model, tokenizer, chunk, wanted.batch)
    return VllmEngine(wanted.model, tokenizer, longest, gpus=wanted.gpus, kv_dtype=wanted.kv_dtype, chunk=chunk)


def _open(wanted: RunSettings, device: str) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Model and tokenizer; no model for an engine that opens it itself."""
    if wanted.engine == "transformers":
        return load_model_and_tokenizer(wanted.model, device)
    try:
        return None, AutoTokenizer.from_pretrained(wanted.model)
    except OSError as error:
        raise ValueError(f"{wanted.model} cannot be opened as a checkpoint: {str(error).splitlines()[0]}") from error


def check_same_run(wanted: RunSettings, out: Path) -> None:
    """See that a folder is free, or holds a run that this one goes on with.

    Raises:
        ValueError: It holds another run.
    """
    if not (out / SETTINGS_FILE).exists():
        return
    there = settings.load(RunSettings, out / SETTINGS_FILE)
    for name in FIXED:
        if getattr(there, name) != getattr(wanted, name):
            raise ValueError(
                f"{out} holds a run with {name} {getattr(there, name)}, this one has "
                f"{getattr(wanted, name)}. Give another --out, or remove the folder."
            )


def plan_pairs(
    names: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wanted: RunSettings,
    texts: Sequence[str] | None,
) -> tuple[list[tuple[str, int]], dict[str, Path], dict[str, str]]:
    """Which test is asked at which length, with all that could stop it found before the first answer.

    Returns:
        Pairs of test and length, shortest first; files of questions by test; and the reason of each test, or test at a
        length, left out.

    Raises:
        ValueError: A test cannot be made and `skip_missing` is not set; the message names all such tests.
    """
    pairs: list[tuple[str, int]] = []
    questions: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    data = None if wanted.data is None else Path(wanted.data)
    for name in (name for name in names if name not in SPECIAL):
        chosen = [max(lengths)] if name in PUBLISHED else sorted(lengths)
        reasons: dict[int, str] = {}
        for place, length in enumerate(chosen):
            try:
                found = find_questions(name, data)
                check_task(name, tokenizer, length, chat=wanted.chat, haystack=texts, questions=found)
            except (ValueError, ImportError) as error:
                reasons[length] = str(error)
                continue
            # What can be made at one length can be made at all longer ones.
            pairs += [(name, longer) for longer in chosen[place:]]
            questions |= {} if found is None else {name: found}
            break
        if len(reasons) == len(chosen):
            skipped[name] = reasons[chosen[-1]]
        else:
            skipped |= {f"{name} at {length:,}": reason for length, reason in reasons.items()}
    if skipped and not wanted.skip_missing:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise ValueError(f"Some tests cannot be made. {told}{more} (--skip-missing runs the rest.)")
    return sorted(pairs, key=lambda pair: pair[1]), questions, skipped


def grid_lengths(count: int, longest: int) -> list[int]:
    """Evenly spaced lengths up to the longest; the first, which would be 0, becomes a short control."""
    spaced = [round(length) for length in np.linspace(0, longest, count)][1:] if count > 1 else [longest]
    control = [min(CONTROL, spaced[0] // 2)] if count > 1 else []
    return [*control, *spaced]


def measure_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: RunSettings,
    longest: int,
    texts: Sequence[str] | None,
    path: Path,
    engine: Engine | None = None,
    *,
    quiet: bool = False,
) -> None:
    """The needle map, cell by cell, into a file of JSON lines; cells that are there are kept.

    Answers are read off the model's own forward pass, or decoded by an engine that has the model to itself.

    Raises:
        ValueError: As for `needle_grid`.
    """
    cells = [
        (length, float(depth), wanted.grid_samples)
        for length in grid_lengths(wanted.grid[0], longest)
        for depth in (np.linspace(0, 1, wanted.grid[1]) if wanted.grid[1] > 1 else [0.5])
    ]
    haystack = prepare_haystack(tokenizer, texts, longest)
    with (
        locked(path.parent),
        progress(
            total=sum(length for length, _, _ in cells), desc="needle map", unit="tok", unit_scale=True, quiet=quiet
        ) as bar,
    ):
        done = {(cell["length"], cell["depth"], cell["n"]) for cell in (read_jsonl(path) if path.exists() else ())}
        for length, depth, samples in cells:
            if (length, depth, samples) not in done:
                if engine is not None:
                    cell = ask_cell(
                        engine, tokenizer, length, depth, samples, wanted.seed, haystack, wanted.chat, longest
                    )
                else:
                    (cell,) = needle_grid(
                        model,
                        tokenizer,
                        [length],
                        [depth],
                        samples,
                        wanted.seed,
                        haystack,
                        chat=wanted.chat,
                        chunk=wanted.chunk_for(length),
                        quiet=True,
                    )
                append_jsonl(path, {**cell, "haystack": haystack.name})
            bar.update(length)


def _perplexity(model: PreTrainedModel, wanted: RunSettings, quiet: bool) -> dict[str, Any]:
    """Perplexity by position in the row and by distance from the start of the token's own document."""
    from ultralong.data.rows.packed_rows import PackedRows

    packed = PackedRows(Path(wanted.rows or ""))
    rows = [packed[index] for index in range(min(wanted.max_rows, len(packed)))]
    edges = position_edges(packed.length)
    return {
        by: perplexity_by_position(
            model, rows, edges, by=by, chunk=wanted.chunk_for(packed.length), seed=wanted.seed, quiet=quiet
        )
        for by in ("row", "document")
    }
