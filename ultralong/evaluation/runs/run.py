"""`ultralong eval run`: make samples, let a model answer, score, report; after a stop it resumes where it stopped.

A folder holds one run: `run.yaml` (what was asked), `TASK-LENGTH.jsonl` (answers, appended one by one), `needle.jsonl`
(cells of the map, appended one by one), `perplexity.json`, `longppl.json`, `loss.json`, `lm_eval.json`, and what is
made from those files alone and can be made again without the model (`ultralong eval report`): `results.json`, which
holds every measurement in one shape (`Result`), `report.json` and the page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.runs.checks import check_needs, check_own_files, check_same_run, plan_pairs
from ultralong.evaluation.runs.direct import grid_axes, measure_benchmarks, measure_grid, measure_rows
from ultralong.evaluation.runs.records import answer_pairs
from ultralong.evaluation.runs.results import SETTINGS_FILE, write_results
from ultralong.evaluation.runs.settings import RunSettings, doubled_lengths, within_window
from ultralong.evaluation.tasks.groups import expand
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.inference.engines import Engine, LocalEngine
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.openai_engine import OpenAIEngine
from ultralong.inference.sharded_engine import with_model
from ultralong.inference.vllm_engine import VllmEngine
from ultralong.rope import declared_window
from ultralong.utils import settings
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import locked, write_json
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.progress import hidden_bars


def run(
    wanted: RunSettings,
    out: str | os.PathLike[str],
    *,
    before: str | os.PathLike[str] | None = None,
    device: str = "auto",
    opened: tuple[PreTrainedModel | None, PreTrainedTokenizerBase] | None = None,
    engine: Engine | None = None,
    draw: bool = True,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Do what is missing of a run, and report.

    Args:
        wanted: What to measure.
        out: Folder of the run.
        before: Folder of a run of the earlier model, to compare with.
        device: `auto`, or any of torch's.
        opened: The model and its tokenizer when they are open already.
        engine: What answers, when it is there already.
        draw: False writes the numbers alone, see `write_results`.
        quiet: True draws no progress bars.

    Returns:
        What `report.json` holds: see `results.summarise`. None on torchrun's other processes.

    Raises:
        ValueError: The folder holds another run, or another process writes there; a test is unknown, misses its data or
            needs longer prompts; or no length lies within the window.
        ImportError: A package that one of the tests needs is not installed.
    """
    names = expand(wanted.tasks)
    check_needs(names, wanted)
    check_own_files(names, Path(out))
    if opened is None and wanted.shared:
        return with_model(
            partial(_run_opened, wanted, out, before, draw, quiet),
            wanted.model,
            gpus=wanted.gpus,
            kv=wanted.kv_dtype,
            chunk=wanted.chunk,
            device=device,
            quiet=quiet,
        )
    out = Path(out)
    check_same_run(wanted, out)
    texts = read_haystack(wanted.haystack)
    with hidden_bars(quiet):
        model, tokenizer = opened or _open(wanted, device)
    config = AutoConfig.from_pretrained(wanted.model) if model is None else model.config
    window = declared_window(config.get_text_config())
    lengths = within_window(wanted.lengths or doubled_lengths(window), window, wanted.beyond_window)
    pairs, questions, skipped = plan_pairs(names, lengths, tokenizer, wanted, texts)
    with locked(out):  # all of it, as another run's settings would be written over these
        check_same_run(wanted, out)  # what has come meanwhile
        asked = replace(wanted, tasks=tuple(names), lengths=tuple(lengths))
        settings.save(asked, out / SETTINGS_FILE, "Repeat or resume with: ultralong eval run")
        facts = {"window": window, "skipped": skipped, "model": describe_model(config, model), **describe_environment()}
        write_json(out / "environment.json", facts)
        if engine is None and model is None and (pairs or "needle" in names):
            engine = _engine(wanted, model, tokenizer, max(lengths))
        if "needle" in names:
            axes = grid_axes(wanted, max(lengths), window)
            measure_grid(model, tokenizer, wanted, axes, texts, out / "needle.jsonl", engine, quiet=quiet)
        if pairs:
            engine = _engine(wanted, model, tokenizer, max(lengths)) if engine is None else engine
            left_out = _answer(wanted, engine, tokenizer, pairs, questions, texts, out, quiet)
            if left_out:
                facts["skipped"] = {**skipped, **left_out}
                write_json(out / "environment.json", facts)
        if model is not None:
            measure_rows(names, model, wanted, window, out, device, quiet)
        if "lm_eval" in names:
            if opened is None:
                engine = None  # with its cache and its graphs
            measure_benchmarks(wanted, model, tokenizer, out, quiet, release=opened is None)
        return write_results(out, before, draw=draw)


def _answer(
    wanted: RunSettings,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, int]],
    questions: Mapping[str, str | os.PathLike[str]],
    texts: Sequence[str] | None,
    out: Path,
    quiet: bool,
) -> dict[str, str]:
    """Answer what is missing of every test at every length; returns why some were left out, by test and length."""
    left_out: dict[tuple[str, int], str] = {}
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
        left_out=left_out if wanted.skip_missing else None,
        quiet=quiet,
    )
    return {f"{task} at {length:,}": why for (task, length), why in left_out.items()}


def describe_model(config: PretrainedConfig, model: PreTrainedModel | None) -> str:
    """What a model is, in a line: its class, size, window and RoPE scaling, as its config says.

    Args:
        config: The model's config.
        model: The model, whose parameters are counted; None leaves their number out.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    scaling = f"{rope.get('rope_type', 'default')}" + (f", factor {rope['factor']:g}" if rope.get("factor") else "")
    count = sum(parameter.numel() for parameter in model.parameters()) if isinstance(model, torch.nn.Module) else 0
    return "; ".join(
        [
            ", ".join(getattr(config, "architectures", None) or [str(config.model_type)]),
            *([f"{count:,} parameters"] if count else []),
            f"{text.num_hidden_layers} layers",
            f"window of {declared_window(text):,} tokens",
            f"RoPE {scaling}",
        ]
    )


def _run_opened(
    wanted: RunSettings,
    out: str | os.PathLike[str],
    before: str | os.PathLike[str] | None,
    draw: bool,
    quiet: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine | None,
) -> dict[str, Any] | None:
    """`run` with its arguments in the order that `with_model` fills."""
    return run(wanted, out, before=before, opened=(model, tokenizer), engine=engine, draw=draw, quiet=quiet)


def _engine(
    wanted: RunSettings, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Engine:
    chunk = wanted.chunk_for(longest)
    if model is not None:
        # The fused step between batches was never run on a GPU; alone it was.
        return LocalEngine(model, tokenizer, chunk, wanted.batch, fused=wanted.batch == 1)
    if wanted.endpoint is not None:
        return OpenAIEngine(wanted.endpoint, tokenizer, wanted.endpoint_model, wanted.key_variable)
    return VllmEngine(wanted.model, tokenizer, longest, gpus=wanted.gpus, kv_dtype=wanted.kv_dtype, chunk=chunk)


def _open(wanted: RunSettings, device: str) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Model and tokenizer; no model for an engine that opens it itself."""
    if wanted.engine == "transformers":
        return load_model_and_tokenizer(wanted.model, device)
    return None, load_tokenizer(wanted.model)
