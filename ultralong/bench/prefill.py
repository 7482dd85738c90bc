"""Speed and memory of prefill on this machine: `ultralong bench prefill MODEL --lengths 262144 --gpus 1 --json FILE`.

The model has the shape asked for and random weights, made on the GPU; ids are random. A prompt is read as an evaluation
reads it (`ultralong.inference.sharded_generation`), then a few tokens are decoded. Useful work is causal: 2 T^2 H D a
layer for attention, and 2 for each token and parameter of the layers. Beside it stands the forward attention kernel
alone, in one call over the same length on the same GPU, which is what long prompts can approach at best. With several
GPUs rates are per GPU, and the kernel has each GPU's share of the heads. Kernels are compiled and chosen before
anything is timed, on a prompt of up to 16,384 tokens that is also read in one plain pass; `apart_from_plain` is the
mean distance of the two readings' logits over their spread (rounding of the model's type, and what an 8-bit cache
costs).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ultralong.attention.kernels import attention_forward, choose_kernel
from ultralong.attention.spec import AttentionSpec
from ultralong.bench.prefill_options import PrefillBench
from ultralong.bench.results import write_rows
from ultralong.bench.timing import clear, cut_config, make_model, now, over_gpus, peak_gib, random_ids, slowest
from ultralong.inference.generate import prefill
from ultralong.inference.runner import Runner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.planner.shapes import Shape, model_config, shape_of
from ultralong.utils.units import GIB

WARM = 16384  # tokens of the prompt that is read before anything is timed
DECODED = 8
RULE = (
    "causal: 2 T^2 H D a layer for attention, 2 for each token and parameter of the layers, the head for one token only"
)


def bench_prefill(options: PrefillBench, path: Path | None = None) -> list[dict[str, Any]]:
    """Measure every length.

    Args:
        options: What to measure.
        path: JSON file, written after every length.

    Returns:
        One row a length; see `_row`.

    Raises:
        ValueError: No such model, or fewer GPUs than asked for.
        ultralong.utils.local_ranks.RankFailed: A process failed, such as by running out of memory.
    """
    model_config(options.model)  # says what is wrong here, not in another process
    return over_gpus(_measure_all, options.gpus, options, path)


def _measure_all(rank: int, world: int, device: str, options: PrefillBench, path: Path | None) -> list[dict[str, Any]]:
    config, about = cut_config(options.model, options.layers)
    config.max_position_embeddings = max(*options.lengths, WARM) + DECODED
    model, shape = make_model(config, device), shape_of(config)
    rows: list[dict[str, Any]] = []
    for tokens in options.lengths:
        measured = _read(model, options, tokens, world, rank)
        rate = kernel_rate(options.kernel, tokens, shape, world, model)
        rows.append({**about, **_row(options, shape, tokens, world, measured, rate)})
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
            if path is not None:
                write_rows(path, rows, options=asdict(options), flop_rule=RULE)
    return rows


def _read(model: PreTrainedModel, options: PrefillBench, tokens: int, world: int, rank: int) -> dict[str, float]:
    """Read one prompt and decode a little: the slowest process's seconds, and the most memory of any."""
    group = dist.group.WORLD if world > 1 else None
    kv = "fp8" if options.kv == "fp8" else "auto"
    make = partial(ShardedRunner, model, group=group, kv=kv, kernel=options.kernel, quiet=rank > 0)
    ids = random_ids(model, 1, tokens)
    apart = _warm_up(model, ids[:, :WARM], make(WARM + DECODED, chunk=WARM // 2))
    clear(model.device)
    reader = make(tokens + DECODED, chunk=options.chunk)
    start = now(model.device)
    logits = reader.prefill(ids)
    read = now(model.device) - start
    finite = bool(torch.isfinite(logits).all())
    token, start = logits.argmax(-1), now(model.device)
    for _ in range(DECODED):
        token = reader.decode(token).argmax(-1)
    step = (now(model.device) - start) / DECODED
    peak = peak_gib(model.device)
    cache, chunk = reader.cache.bytes / GIB, reader.chunk or tokens
    del reader, logits
    clear(model.device)
    return {
        "seconds": slowest(read, model.device),
        "seconds_per_token": slowest(step, model.device),
        "peak_gib": peak,
        "cache_gib": slowest(cache, model.device),
        "chunk": chunk,
        "apart": slowest(apart, model.device),
        "finite": finite,
    }


def _warm_up(model: PreTrainedModel, ids: Tensor, reader: Runner) -> float:
    """Read a short prompt in chunks and in one plain pass: mean distance of the logits over their deviation."""
    logits = reader.prefill(ids).float()
    reader.decode(ids[:, 0])
    plain = prefill(model, ids)[:, -1].float()
    return float((logits - plain).abs().mean() / plain.std())


def kernel_rate(name: str, tokens: int, shape: Shape, world: int, model: PreTrainedModel) -> float:
    """FLOP/s of the faster of two causal forward calls over the whole length, with each GPU's share of the heads.

    The first may compile: strides beyond 2^31 elements are another kernel than those of the short call before it.
    """
    kv_heads = max(1, shape.kv_heads // world)
    heads = shape.heads // shape.kv_heads * kv_heads
    make = torch.Generator(model.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, count, shape.head_dim, generator=make, device=model.device, dtype=model.dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    spec = AttentionSpec(scale=shape.head_dim**-0.5)
    kernel = choose_kernel(name, q, spec)
    short = slice(min(tokens, WARM))
    attention_forward(kernel, q[:, short], k[:, short], v[:, short], spec)
    calls = []
    for _ in range(2):
        start = now(model.device)
        attention_forward(kernel, q, k, v, spec)
        calls.append(slowest(now(model.device) - start, model.device))
    seconds = min(calls)
    del q, k, v
    clear(model.device)
    return 2.0 * tokens**2 * heads * shape.head_dim / seconds


def prefill_flops(shape: Shape, tokens: int) -> tuple[float, float]:
    """Useful work of attention, and of matrix products, see `RULE`."""
    head = shape.vocabulary * shape.hidden
    attended = 2.0 * tokens**2 * shape.heads * shape.head_dim * shape.layers
    return attended, 2.0 * (shape.multiplied - head) * tokens + 2.0 * head


def _row(
    options: PrefillBench, shape: Shape, tokens: int, world: int, measured: dict[str, float], rate: float
) -> dict[str, Any]:
    """What one length gave; rates in TF/s per GPU, memory of the GPU that needs most."""
    attended, multiplied = prefill_flops(shape, tokens)
    achieved = (attended + multiplied) / world / measured["seconds"]
    return {
        "tokens": tokens,
        "gpus": world,
        "kv": options.kv,
        "chunk": int(measured["chunk"]),
        "seconds": round(measured["seconds"], 3),
        "tokens_per_second": round(tokens / measured["seconds"], 1),
        "tflops": round(achieved / 1e12, 6),
        "kernel_tflops": round(rate / 1e12, 6),
        "of_kernel": round(achieved / rate, 4),
        "attention_share_of_work": round(attended / (attended + multiplied), 4),
        "peak_gib": round(measured["peak_gib"], 2),
        "cache_gib": round(measured["cache_gib"], 3),
        "decode_seconds_per_token": round(measured["seconds_per_token"], 4),
        "apart_from_plain": float(f"{measured['apart']:.2g}"),
        "finite": bool(measured["finite"]),
    }
