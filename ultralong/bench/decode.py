"""Speed of decoding on this machine: `ultralong bench decode MODEL --lengths 32k --gpus 1 --json FILE`.

The model has the shape asked for and random weights, made on the GPU; ids are random. Each prompt is answered greedily
by transformers' `generate` with its `DynamicCache` and scaled_dot_product_attention, and by this library's runners, in
the same process on the same weights: one prompt by the runner of one GPU and by the sharded one (over all GPUs, in the
model's type and in fp8), several together by the batched one. A step is timed from the first new token to the last, so
reading the prompt, which is timed apart, is not part of it. Each way first answers a short prompt, with which kernels
are compiled and chosen. With several GPUs all of them do alone what one GPU does, and the slowest counts.

`of_transformers` is the rate over that of transformers for the same prompts. `same_tokens` is the share of new tokens
that both chose: 1 in float32; random weights in bfloat16 often have several likeliest tokens, and fp8 rounds. Rows
named `ahead` started each step before the host had read its token, as the sharded cache does itself. With `--waiting`
one that waited stands before each: `same_as_waiting` is the share of tokens that are the same, 1 on any device.

A step reads every weight but the embedding's, and every key and value: `read_gib` of the GPU that reads most, each of
which has all weights and its part of the cache. Over the seconds of a step that is `gigabytes_per_second`, and
`of_copy` its share of what a copy inside the GPU's memory moves in the same run, bytes read and written together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ultralong import attention
from ultralong.bench.decode_options import DecodeBench
from ultralong.bench.results import write_rows
from ultralong.bench.timing import clear, cut_config, make_model, now, over_gpus, peak_gib, random_ids, slowest
from ultralong.checkpoints.config import head_size
from ultralong.inference.batched import BatchedRunner
from ultralong.inference.decoding import Sampler, Step, decode
from ultralong.inference.generate import stream
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.runner import Runner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.planner.shapes import model_config
from ultralong.utils.units import GIB

AHEAD = ", ahead"  # in the names of rows
COPIES = 10
WARM_TOKENS, WARM_STEPS = 4096, 4  # prompt and answer before anything is timed
RULE = "tokens_per_second: prompts answered together over the seconds of one step, from the first new token to the last"
Row = dict[str, Any]


def bench_decode(options: DecodeBench, path: Path | None = None) -> list[Row]:
    """Measure every way of decoding for every prompt length, and for the batch.

    Args:
        options: What to measure.
        path: JSON file, written after every row.

    Returns:
        One row for each way; see `_row`.

    Raises:
        ValueError: No such model, fewer GPUs than asked for, or no fused step where nothing else is measured.
        ultralong.utils.local_ranks.RankFailed: A process failed.
    """
    model_config(options.model)  # says what is wrong here, not in another process
    if not (rows := over_gpus(_measure_all, options.gpus, options, path)):
        raise ValueError("the fused step needs a CUDA GPU and a model that it knows: leave out --fused-only")
    return rows


@dataclass
class Timed:
    """What answering took: seconds of reading and of one step, memory in GiB, and the new tokens (B, N)."""

    prefill: float
    step: float
    peak_gib: float
    said: Tensor


Answer = Callable[[Tensor, int], Timed]  # of prompts (B, T) and the number of new tokens


@dataclass(frozen=True)
class Way:
    """One way of decoding: its name in the rows, the GPUs and the cache's type, and how it answers."""

    name: str
    kv: str
    gpus: int
    answer: Answer
    runner: ShardedRunner | None = None


def _measure_all(rank: int, world: int, device: str, options: DecodeBench, path: Path | None) -> list[Row]:
    config, about = cut_config(options.model, options.layers)
    config.max_position_embeddings = max(options.longest, WARM_TOKENS + WARM_STEPS)
    model = make_model(config, device)
    model.generation_config.eos_token_id = None  # every answer has its whole length
    rows: list[Row] = []
    copied = copy_rate(model.device)
    work = [(1, tokens) for tokens in options.lengths] + ([(options.batch, options.batch_tokens)] * bool(options.batch))
    for batch, tokens in work:
        ids = random_ids(model, batch, tokens)
        plain: Timed | None = None
        waited: Timed | None = None
        for way in _ways(model, options, batch, world):
            timed = _measure(way, ids, options.new_tokens, world)
            plain = timed if way.name == "transformers" else plain
            row = _row(way, ids, options, timed, plain) | _traffic(way, model, ids, timed, copied)
            if options.waiting and way.name.endswith(AHEAD):
                row |= _same(timed, waited, "same_as_waiting")
            waited = timed
            rows.append(about | row)
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                if path is not None:
                    write_rows(path, rows, options=asdict(options), rate_rule=RULE)
    return rows


def _ways(model: PreTrainedModel, options: DecodeBench, batch: int, world: int) -> Iterator[Way]:
    """First transformers, with which the others are compared; each with the attention that it is for."""
    if not options.filled:
        model.set_attn_implementation("sdpa")
        yield Way("transformers", "bf16", 1, partial(_by_transformers, model))
        model.set_attn_implementation(attention.NAME)
        if batch > 1:
            yield Way("ultralong, batched", "bf16", 1, partial(_by_runner, BatchedRunner(model)))
            return
        yield Way("ultralong", "bf16", 1, partial(_by_runner, LocalRunner(model)))
    group = dist.group.WORLD if world > 1 else None
    ways = options.exchange if world > 1 else options.exchange[:1]
    for kv in options.kv:
        for fused in (*(() if options.fused_only else ("",)), *ways):
            of_cache = "auto" if kv == "bf16" else kv
            runner = ShardedRunner(
                model, None, group, kv=of_cache, chunk=options.chunk, fused=bool(fused), exchange=fused or ways[0]
            )
            if fused and runner.step is None:  # on a CPU, or a model that it does not know
                continue
            answer = partial(_behind_random if options.filled else _by_runner, runner)
            chosen = runner.step.exchange if runner.step else ""
            said = "" if chosen in ("", "direct") else f", exchange {chosen}"
            name = "ultralong, sharded" + (f", fused{said}" if fused else "")
            able = runner.ahead
            for runner.ahead in (False, able) if able and options.waiting else (able,):
                yield Way(name + AHEAD * runner.ahead, kv, world, answer, runner)


def _measure(way: Way, ids: Tensor, new_tokens: int, world: int) -> Timed | None:
    """None where memory ran out, which several processes cannot survive."""
    try:
        way.answer(ids[:, :WARM_TOKENS], WARM_STEPS)
        clear(ids.device)
        return way.answer(ids, new_tokens)
    except torch.OutOfMemoryError:
        if world > 1:
            raise
    finally:
        clear(ids.device)
    return None


def _by_runner(runner: Runner, ids: Tensor, new_tokens: int) -> Timed:
    """Answer by a runner of this library, which holds nothing before or after."""
    runner.release()
    return _timed(runner, now(ids.device), stream(runner, ids, new_tokens, stop=()), ids, 1)


def _behind_random(runner: ShardedRunner, ids: Tensor, new_tokens: int) -> Timed:
    """Decode behind a cache of random numbers."""
    start = now(ids.device)
    runner.prefill_random(ids, new_tokens)
    logits = torch.zeros(len(ids), runner.model.config.get_text_config().vocab_size, device=ids.device)
    # The second step is the first that is alike all others: kernels are there, and a graph is recorded with it.
    steps = decode(runner, logits, [new_tokens] * len(ids), (), Sampler())
    return _timed(runner, start, steps, ids, min(3, new_tokens - 1))


def _timed(runner: Runner, start: float, steps: Iterator[Step], ids: Tensor, untimed: int) -> Timed:
    """Seconds from the host's having one token to its having the last; nothing else is waited for between them."""
    times, said = [], []
    for step in steps:
        times.append(time.perf_counter())
        said.append(step.tokens)
    peak = peak_gib(ids.device)
    runner.release()
    first = times[untimed - 1]
    return Timed(first - start, (times[-1] - first) / (len(times) - untimed), peak, torch.tensor(said).T)


def copy_rate(device: torch.device) -> float:
    """Bytes/s that a copy inside the memory reads and writes, together; by this process's clock alone.

    Other processes do the same meanwhile, but a barrier between them is no part of a copy, which lasts 10 ms.
    """
    size = 2 * GIB if device.type == "cuda" else GIB // 128
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    target.copy_(source)
    wait()
    start = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source)
    wait()
    return 2.0 * COPIES * source.numel() * source.element_size() / (time.perf_counter() - start)


def _traffic(way: Way, model: PreTrainedModel, ids: Tensor, timed: Timed | None, copied: float) -> Row:
    """What a step of one prompt by the sharded cache reads, and how fast."""
    if timed is None or way.runner is None:
        return {}
    if "fused" in way.name and way.runner.step is None:
        return {"note": "the fused step failed, and the model's own code was measured"}
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    weights -= 0 if head.weight is embedding else embedding.numel() * embedding.element_size()
    config = model.config.get_text_config()
    size = head_size(config)
    each = size + 2 if way.kv == "fp8" else size * embedding.element_size()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * each * -(-ids.numel() // way.gpus)
    rate = (weights + cache) / slowest(timed.step, ids.device)
    return {
        "read_gib": round((weights + cache) / GIB, 4),
        "gigabytes_per_second": round(rate / 1e9, 3),
        "of_copy": round(rate / copied, 4),
    }


def _by_transformers(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Timed:
    """Answer by transformers' own loop."""
    clock = FirstToken()
    start = now(ids.device)
    whole = model.generate(  # type: ignore[operator]  # transformers' mixin is untyped here
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(config=model.config),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    last = now(ids.device)
    peak = peak_gib(ids.device)
    return Timed(clock.first - start, (last - clock.first) / (new_tokens - 1), peak, whole[:, ids.shape[1] :].cpu())


class FirstToken(StoppingCriteria):
    """Stops nothing, and notes when the first new token was there."""

    first = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by `generate` after every token; which of the prompts (B,) have ended."""
        self.first = self.first or now(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _row(way: Way, ids: Tensor, options: DecodeBench, timed: Timed | None, plain: Timed | None) -> Row:
    """What one way gave; the slowest process's seconds, memory of the GPU that needs most."""
    row: Row = {
        "name": way.name,
        "tokens": ids.shape[1],
        "batch": ids.shape[0],
        "new_tokens": options.new_tokens,
        "gpus": way.gpus,
        "kv": way.kv,
    }
    if timed is None:
        return row | {"note": "out of memory"}
    step = slowest(timed.step, ids.device)
    row |= {
        "prefill_seconds": round(slowest(timed.prefill, ids.device), 4),
        "decode_seconds_per_token": round(step, 6),
        "tokens_per_second": round(ids.shape[0] / step, 2),
        "peak_gib": round(timed.peak_gib, 3),
    }
    if plain is not None:
        row |= {"of_transformers": round(slowest(plain.step, ids.device) / step, 4)}
        row |= _same(timed, plain, "same_tokens")
    return row


def _same(timed: Timed | None, other: Timed | None, name: str) -> Row:
    """The share of new tokens that two ways chose alike, where both answered."""
    if timed is None or other is None:
        return {}
    return {name: round(float((timed.said == other.said).float().mean()), 4)}
