"""`ultralong eval run`: make samples, let a model answer, score, report; stop it at any time, it goes on where it was.

A folder holds one run: `run.yaml` (what was asked), `TASK-LENGTH.jsonl` (answers, appended one by one), `needle.jsonl`
(cells of the grid, appended one by one), `perplexity.json`, `standard.json`, and the report, which is made from those
files alone and can be made again without the model (`ultralong eval report`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ultralong import settings
from ultralong.evaluation.commands import open_model, position_edges, read_haystack
from ultralong.evaluation.engines import OwnEngine, VllmEngine
from ultralong.evaluation.groups import SPECIAL, expand, find_questions
from ultralong.evaluation.needle import needle_grid, prepare_haystack
from ultralong.evaluation.perplexity import perplexity_by_position
from ultralong.evaluation.records import answer_pairs
from ultralong.evaluation.report import describe_environment
from ultralong.evaluation.results import SETTINGS_FILE, write_results
from ultralong.evaluation.samples import PUBLISHED, check_task
from ultralong.evaluation.standard import find_benchmarks, measure_standard
from ultralong.extras import require
from ultralong.files import append_jsonl, read_jsonl, write_json
from ultralong.progress import progress

SHORTEST = 4096  # RULER's first length
CONTROL = 1024  # the needle map's first column, where the published one has the length 0
FIXED = ("model", "seed", "chat", "haystack", "data", "rows", "engine")
ONE_PASS = 32768  # prompts up to this go in one pass unless a chunk is asked for


@dataclass(frozen=True)
class RunSettings:
    """What to measure. A run may be repeated with more tests, lengths or samples: what is there is not done again.

    Attributes:
        model: Folder or hub id.
        tasks: Tests and groups of tests.
        lengths: Tokens of prompt and answer; doubled from 4,096 to the model's window when empty. Published texts have
            the length that they have: they are asked once, cut where they exceed the longest of these.
        samples: Samples of each test at each length.
        grid: Lengths and depths of the needle map, evenly spaced up to the longest length.
        grid_samples: Prompts in each cell of the map.
        seed: Seed of the samples.
        chunk: Tokens of one prefill pass; None takes 16,384 for prompts beyond 32,768 tokens.
        chat: True asks in the chat template, False plainly; None takes the template where there is one.
        haystack: Text file or folder to fill prompts with.
        data: Folder of published data, or `package` for SQuAD from a package registry.
        rows: Folder of packed rows, for perplexity.
        max_rows: Rows to use of them.
        beyond_window: Ask also at lengths beyond the model's window.
        skip_missing: Leave out tests whose data is missing instead of stopping.
        benchmarks: Short benchmarks to take of lm-eval's; all when empty.
        limit: Samples of each of their tasks; None takes all.
        run_code: HumanEval may run the programs that the model wrote.
        engine: What answers samples: transformers, or vllm, which must be installed.
        gpus: vllm: GPUs to split the model over.
        kv_dtype: vllm: type of keys and values, auto or fp8.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    samples: int = 20
    grid: tuple[int, int] = (40, 10)
    grid_samples: int = 3
    seed: int = 0
    chunk: int | None = None
    chat: bool | None = None
    haystack: str | None = None
    data: str | None = None
    rows: str | None = None
    max_rows: int = 16
    beyond_window: bool = False
    skip_missing: bool = False
    benchmarks: tuple[str, ...] = ()
    limit: int | None = None
    run_code: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    gpus: int = 1
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.grid_samples < 1 or min(self.grid) < 1:
            raise ValueError("samples, grid_samples and both sides of grid must be at least 1, got "
                             f"{self.samples}, {self.grid_samples} and {self.grid}.")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths are tokens, got {list(self.lengths)}.")
        if self.engine == "vllm" and {"needle", "perplexity"} & set(self.tasks):
            raise ValueError("The needle map and perplexity read the model's own forward pass, which vllm does not "
                             "give: leave them out, or --engine away.")


def run(wanted: RunSettings, out: str | os.PathLike[str], *, before: str | os.PathLike[str] | None = None,
        device: str = "auto", opened: tuple[PreTrainedModel | None, PreTrainedTokenizerBase] | None = None,
        quiet: bool = False) -> dict[str, Any]:
    """Do what is missing of a run, and report.

    Args:
        wanted: What to measure.
        out: Folder of the run.
        before: Folder of another run, of the model before, to set beside it.
        device: `auto`, or any of torch's.
        opened: The model and its tokenizer when they are open already.
        quiet: True draws no progress bars.

    Returns:
        What `report.json` holds: see `results.summarise`.

    Raises:
        ValueError: The folder holds another run; a test is unknown, misses its data or needs longer prompts; or no
            length lies within the window.
    """
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
        measure_grid(model, tokenizer, wanted, max(lengths), texts, out / "needle.jsonl", quiet=quiet)
    if pairs:
        chunk = _chunk(wanted, max(lengths))
        engine = OwnEngine(model, tokenizer, chunk) if model is not None else VllmEngine(
            wanted.model, tokenizer, max(lengths), gpus=wanted.gpus, kv_dtype=wanted.kv_dtype, chunk=chunk)
        answer_pairs(engine, tokenizer, pairs, wanted.samples, wanted.seed, out, chat=wanted.chat, haystack=texts,
                     questions=questions, quiet=quiet)
    if "perplexity" in names and not (out / "perplexity.json").exists():
        write_json(out / "perplexity.json", _perplexity(model, wanted, quiet))
    if "standard" in names:
        chat = bool(tokenizer.chat_template) if wanted.chat is None else wanted.chat
        write_json(out / "standard.json", measure_standard(
            wanted.model, out / "standard", names=wanted.benchmarks, data=wanted.data,
            device="cuda" if model is None else model.device.type, chat=chat, limit=wanted.limit,
            run_code=wanted.run_code, quiet=quiet))
    return write_results(out, before)


def _open(wanted: RunSettings, device: str) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Model and tokenizer; no model for an engine that opens it itself."""
    if wanted.engine == "transformers":
        return open_model(wanted.model, device)
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
            raise ValueError(f"{out} holds a run with {name} {getattr(there, name)}, this one has "
                             f"{getattr(wanted, name)}. Give another --out, or remove the folder.")


def doubled_lengths(window: int) -> tuple[int, ...]:
    """4,096 and its doubles up to the window, as RULER is reported; the window alone where it is shorter."""
    lengths = []
    length = SHORTEST
    while length <= window:
        lengths.append(length)
        length *= 2
    return tuple(lengths) or (window,)


def within_window(lengths: Sequence[int], window: int, beyond: bool) -> list[int]:
    """The lengths to ask at, in order; those beyond the model's window only if told to, and never without a warning.

    Raises:
        ValueError: None is left.
    """
    ordered = sorted(set(lengths))
    longer = [length for length in ordered if length > window]
    if not longer:
        return ordered
    said = f"{', '.join(f'{length:,}' for length in longer)} tokens are beyond the model's window of {window:,}"
    if beyond:
        warnings.warn(f"{said}: expect it to fail there.", stacklevel=3)
        return ordered
    if len(longer) == len(ordered):
        raise ValueError(f"{said}. Ask at shorter lengths, extend the model first (ultralong extend), or measure how "
                         "it fails there with --beyond-window.")
    warnings.warn(f"{said} and are left out: --beyond-window asks there too.", stacklevel=3)
    return [length for length in ordered if length <= window]


def plan_pairs(names: Sequence[str], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, wanted: RunSettings,
               texts: Sequence[str] | None) -> tuple[list[tuple[str, int]], dict[str, Path], dict[str, str]]:
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


def measure_grid(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: RunSettings, longest: int,
                 texts: Sequence[str] | None, path: Path, *, quiet: bool = False) -> None:
    """The needle map, cell by cell, into a file of JSON lines; cells that are there are kept.

    Raises:
        ValueError: As for `needle_grid`.
    """
    done = {(cell["length"], cell["depth"], cell["n"]) for cell in (read_jsonl(path) if path.exists() else ())}
    cells = [(length, float(depth), wanted.grid_samples) for length in grid_lengths(wanted.grid[0], longest)
             for depth in (np.linspace(0, 1, wanted.grid[1]) if wanted.grid[1] > 1 else [0.5])]
    haystack = prepare_haystack(tokenizer, texts, longest)
    with progress(total=sum(length for length, _, _ in cells), desc="needle map", unit="tok", unit_scale=True,
                  quiet=quiet) as bar:
        for length, depth, samples in cells:
            if (length, depth, samples) not in done:
                (cell,) = needle_grid(model, tokenizer, [length], [depth], samples, wanted.seed, haystack,
                                      chat=wanted.chat, chunk=_chunk(wanted, length), quiet=True)
                append_jsonl(path, {**cell, "haystack": haystack.name})
            bar.update(length)


def _chunk(wanted: RunSettings, length: int) -> int | None:
    if wanted.chunk is not None:
        return wanted.chunk
    return ONE_PASS // 2 if length > ONE_PASS else None


def _perplexity(model: PreTrainedModel, wanted: RunSettings, quiet: bool) -> dict[str, Any]:
    """Perplexity by position in the row and by distance from the start of the token's own document."""
    from ultralong.data.rows import PackedRows

    packed = PackedRows(Path(wanted.rows or ""))
    rows = [packed[index] for index in range(min(wanted.max_rows, len(packed)))]
    edges = position_edges(packed.length)
    return {by: perplexity_by_position(model, rows, edges, by=by, chunk=_chunk(wanted, packed.length),
                                       seed=wanted.seed, quiet=quiet) for by in ("row", "document")}
