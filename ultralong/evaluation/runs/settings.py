"""What a run of the evaluation measures, checked before anything starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ultralong.utils.units import Tokens, check_length, check_seed
from ultralong.utils.words import check_variable, expand_home

KV = Literal["auto", "fp8"]  # names of `ultralong.inference`, which is heavy to import
SHORTEST = 4096  # RULER's first length
ONE_PASS = 32768  # prompts up to this go in one pass unless a chunk is asked for


@dataclass(frozen=True)
class RunSettings:
    """What to measure. A run may be repeated with more tests, lengths or samples: what is there is not done again.

    Attributes:
        model: Folder, hub id or miniature.
        tasks: Tests and groups of tests, and paths of files of questions (.jsonl).
        lengths: Tokens of prompt and answer; by default doubled from 4,096 to the model's window. Published texts have
            the length that they have: they are asked once, cut where they exceed the longest of these. Questions of a
            file are asked uncut, each at the smallest of these that holds it.
        samples: Samples of each test at each length.
        grid: Needle map: how many lengths and depths, evenly spaced up to the longest length.
        grid_samples: Needle map: prompts of each cell.
        needle_lengths: Needle map: its lengths, instead of evenly spaced ones.
        needle_depths: Needle map: its depths, from 0 (first) to 1 (last), instead of evenly spaced ones.
        seed: Seed of the samples.
        chunk: Tokens of one prefill pass; by default 16,384 for prompts beyond 32,768 tokens.
        chat: Ask in the model's chat template, or not; by default where there is one.
        haystack: Text file or folder to fill prompts with.
        data: Folder of published data (LV-Eval, InfiniteBench, LongBench, SQuAD, HotpotQA, benchmarks), or package for
            what a package registry has.
        rows: Perplexity, LongPPL and loss: folder of packed rows.
        max_rows: Perplexity, LongPPL and loss: rows to use.
        evaluator: LongPPL: folder or hub id of the model that chooses the key tokens; by default the model itself,
            whose result then can't be compared with another model's.
        texts: LongPPL: read each document of a row by itself, or the whole row as one text.
        short_context: LongPPL: tokens of the short context that the long one is compared with.
        short_stride: LongPPL: tokens that share a short context.
        key_alpha: LongPPL: nats by which the long context must raise a key token's log-likelihood.
        key_beta: LongPPL: what a key token's log-likelihood with the long context must be above.
        beyond_window: Ask also at lengths beyond the model's window.
        skip_missing: Leave out tests whose data is missing instead of stopping.
        benchmarks: lm_eval: which benchmarks; by default all (MMLU MMLU-Pro MATH GSM-8K HumanEval HellaSwag ARC-Easy
            ARC-Challenge PIQA).
        limit: lm_eval: samples of each task, to try it out; by default all.
        run_code: lm_eval: let HumanEval run the programs that the model wrote, on this machine.
        engine: What answers samples: transformers; vllm, which must be installed; or openai, an endpoint of that
            protocol. Perplexity, LongPPL and loss need transformers.
        endpoint: openai: its URL with the version, such as http://localhost:8000/v1. The model's folder is still
            needed, for its tokenizer and window.
        endpoint_model: openai: the model's name there; by default the only one it has.
        key_variable: openai: environment variable that holds the API key.
        gpus: GPUs that share a prompt (each holds the whole model and its part of the cache), or that vllm splits the
            model over.
        kv_dtype: Type of keys and values: auto, or fp8, which takes half the memory and rounds them to 8 bits.
        batch: Short prompts, or samples of lm_eval, to answer together; by default as many as fit on a GPU (64 at most
            of lm_eval), one on a CPU. With 1 a GPU decodes by the fused step, where there is one for the model: faster
            for long prompts.
        workers: Processes that make samples ahead of the model; 0 makes them as they are asked.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[Tokens, ...] = ()
    samples: int = 20
    grid: tuple[int, int] = (40, 10)
    grid_samples: int = 3
    needle_lengths: tuple[Tokens, ...] = ()
    needle_depths: tuple[float, ...] = ()
    seed: int = 0
    chunk: Tokens | None = None
    chat: bool | None = None
    haystack: str | None = None
    data: str | None = None
    rows: str | None = None
    max_rows: int = 16
    evaluator: str | None = None
    texts: Literal["document", "row"] = "document"
    short_context: Tokens = 4096
    short_stride: Tokens = 1024
    key_alpha: float = 2.0
    key_beta: float = -2.0
    beyond_window: bool = False
    skip_missing: bool = False
    benchmarks: tuple[str, ...] = ()
    limit: int | None = None
    run_code: bool = False
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    endpoint: str | None = None
    endpoint_model: str | None = None
    key_variable: str | None = None
    gpus: int = 1
    kv_dtype: KV = "auto"
    batch: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        expand_home(self, "model", "haystack", "data", "rows", "evaluator")
        if self.samples < 1 or self.grid_samples < 1 or min(self.grid) < 1:
            raise ValueError(
                "samples, grid_samples and both sides of grid must be at least 1, got "
                f"{self.samples}, {self.grid_samples} and {self.grid}."
            )
        check_seed(self.seed)
        check_variable(self.key_variable)
        if any(length < 1 for length in (*self.lengths, *self.needle_lengths)):
            raise ValueError(f"lengths are tokens, got {[*self.lengths, *self.needle_lengths]}.")
        for length in (*self.lengths, *self.needle_lengths):
            check_length("a length", length)
        if not all(0 <= depth <= 1 for depth in self.needle_depths):
            raise ValueError(f"depths are fractions from 0 (first) to 1 (last), got {list(self.needle_depths)}.")
        if self.kv_dtype not in get_args(KV) or self.gpus < 1 or self.workers < 0:
            raise ValueError(
                f"kv is {' or '.join(get_args(KV))}, gpus at least 1 and workers not negative, got "
                f"{self.kv_dtype}, {self.gpus} and {self.workers}."
            )
        if self.shared and {"perplexity", "longppl", "loss", "lm_eval", "standard"} & set(self.tasks):
            raise ValueError(
                "Perplexity, LongPPL, loss and lm-eval's benchmarks run on one GPU with keys and values in the "
                "model's own type: measure them in a run of their own, without --gpus and --kv (LongPPL on several "
                "GPUs: ultralong eval longppl)."
            )
        if self.shared and self.batch not in (None, 1):
            raise ValueError("Several GPUs or 8-bit keys and values read one prompt at a time: leave --batch away.")
        if self.engine != "transformers" and {"perplexity", "longppl", "loss"} & set(self.tasks):
            raise ValueError(
                f"Perplexity, LongPPL and loss read the model's own forward pass, which {self.engine} does not give: "
                "leave them out, or --engine away."
            )
        if (self.engine == "openai") != (self.endpoint is not None):
            raise ValueError("--engine openai and --endpoint URL belong together: give both, or neither.")
        if self.engine == "openai" and (self.gpus > 1 or self.kv_dtype != "auto"):
            raise ValueError("An endpoint chooses its own GPUs and its cache's type: leave --gpus and --kv away.")

    @property
    def shared(self) -> bool:
        """Whether answers come from `sharded_engine.ShardedEngine`."""
        return self.engine == "transformers" and (self.gpus > 1 or self.kv_dtype != "auto")

    def chunk_for(self, length: int) -> int | None:
        """Tokens of one prefill pass for prompts of a length."""
        if self.chunk is not None:
            return self.chunk
        return ONE_PASS // 2 if length > ONE_PASS else None


def doubled_lengths(window: int) -> tuple[int, ...]:
    """4,096 and its doubles up to the window, as RULER is reported; the window alone where it is shorter."""
    lengths = []
    length = SHORTEST
    while length <= window:
        lengths.append(length)
        length *= 2
    return tuple(lengths) or (window,)


def within_window(lengths: Sequence[int], window: int, beyond: bool, quiet: bool = False) -> list[int]:
    """The lengths to ask at, in order; those beyond the model's window only if told to, and never without a warning.

    Args:
        lengths: Tokens.
        window: The model's.
        beyond: Ask beyond it, too.
        quiet: The caller has warned of them already.

    Raises:
        ValueError: None is left.
    """
    ordered = sorted(set(lengths))
    longer = [length for length in ordered if length > window]
    if not longer:
        return ordered
    said = f"{', '.join(f'{length:,}' for length in longer)} tokens are beyond the model's window of {window:,}"
    if beyond:
        if not quiet:
            warnings.warn(f"{said}: expect it to fail there.", stacklevel=3)
        return ordered
    if len(longer) == len(ordered):
        raise ValueError(
            f"{said}. Ask at shorter lengths, extend the model first (ultralong extend), or measure how "
            "it fails there with --beyond-window."
        )
    if not quiet:
        warnings.warn(f"{said} and are left out: --beyond-window asks there too.", stacklevel=3)
    return [length for length in ordered if length <= window]
