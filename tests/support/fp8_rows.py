"""Far keys in FP8 beside flash-attn 4 on one Hopper GPU: `python -m tests.support.fp8_rows OUT.json`.

Rates of rectangles and of causal rows of a whole forward pass, and errors of the last 64 queries against attention in
float32 of the same inputs. Takes about a minute. Needs flash-attn-4 and nvidia-cudnn-frontend. Recorded in
notebooks/results/fp8_forward_h200.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.kernels import Kernel, get_kernel
from ultralong.attention.kernels.fp8 import HEAD_SIZE, Fp8Forward
from ultralong.attention.kernels.fp8_blocks import QUERIES, quantise_keys, quantise_queries, vendor_kernel
from ultralong.attention.spec import AttentionSpec
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import write_json

HEADS, KV_HEADS = 16, 4  # what each of two GPUs has of Llama-3.1-8B under Ulysses
SCALE = HEAD_SIZE**-0.5
LAST = 64  # queries that are compared
ROWS = ((131072, "normal"), (131072, "real"), (262144, "real"), (524288, "normal"), (1048576, "real"))


def inputs(queries: int, keys: int, heads: int, kv_heads: int, kind: str) -> list[Tensor]:
    """q (1, n, H, D), k and v (1, T, K, D) in bfloat16; `real` keys have a mean, and queries are twice as large."""
    make = torch.Generator("cuda").manual_seed(0)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    q, k, v = (torch.randn(1, n, h, HEAD_SIZE, generator=make, device="cuda", dtype=torch.bfloat16) for n, h in shapes)
    if kind == "real":
        k = k + (3 * torch.randn(kv_heads, HEAD_SIZE, generator=make, device="cuda")).to(k.dtype)
        q = q * 2
    return [q, k, v]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a GPU's work, after one call that is not timed."""
    work()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return median(found)


def exact_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last queries in float32 (LAST, H, D)."""
    outs = []
    group = q.shape[2] // k.shape[2]
    hidden = torch.ones(LAST, LAST, dtype=torch.bool, device=q.device).triu(1)
    for head in range(q.shape[2]):
        keys, values = k[0, :, head // group].float(), v[0, :, head // group].float()
        scores = q[0, -LAST:, head].float() @ keys.T * SCALE
        scores[:, -LAST:].masked_fill_(hidden, -torch.inf)
        outs.append(scores.softmax(-1) @ values)
    return torch.stack(outs, 1)


def rectangle(queries: int, keys: int) -> dict[str, Any]:
    """Rates of a block of queries that sees all of its keys, and what quantising takes."""
    q, k, v = inputs(queries, keys, HEADS, KV_HEADS, "normal")
    ours, exact = vendor_kernel(), get_kernel("flash4")
    (q8, q_scale), part = quantise_queries(q, KV_HEADS), quantise_keys(k, v).part(0, keys)
    work = 4.0 * queries * keys * HEADS * HEAD_SIZE
    return {
        "queries": queries,
        "keys": keys,
        "fp8_tflops": round(work / seconds(lambda: ours(q8, q_scale, *part, SCALE), 3) / 1e12, 1),
        "flash4_tflops": round(
            work / seconds(lambda: exact.forward(q, k, v, AttentionSpec(SCALE, causal=False)), 3) / 1e12, 1
        ),
        "quantise_keys_ms": round(seconds(lambda: quantise_keys(k, v), 3) * 1e3, 2),
        "quantise_queries_ms": round(seconds(lambda: quantise_queries(q, KV_HEADS), 3) * 1e3, 2),
    }


def causal_row(tokens: int, kind: str, most_keys: int) -> dict[str, Any]:
    """Rates and errors of a whole row's forward pass; a million tokens have a quarter of the heads."""
    heads, kv_heads = (HEADS, KV_HEADS) if tokens < 2**20 else (HEADS // 4, KV_HEADS // 4)
    q, k, v = inputs(tokens, tokens, heads, kv_heads, kind)
    exact = get_kernel("flash4")
    far: Kernel = Fp8Forward(exact, vendor_kernel(), QUERIES, most_keys)
    wanted, work, spec = exact_last(q, k, v), 2.0 * tokens**2 * heads * HEAD_SIZE, AttentionSpec(SCALE)
    row: dict[str, Any] = {"tokens": tokens, "heads": heads, "kind": kind, "keys": most_keys}
    for name, kernel in (("fp8", far), ("flash4", exact)):
        found = kernel.forward(q, k, v, spec)[0][0, -LAST:].float()
        row[f"{name}_error"] = round(float((found - wanted).norm() / wanted.norm()), 6)
        row[f"{name}_tflops"] = round(work / seconds(lambda each=kernel: each.forward(q, k, v, spec), 1) / 1e12, 1)
    return row


@torch.inference_mode()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file")
    out = parser.parse_args().out
    found: dict[str, Any] = {"machine": machine_facts(), "rectangles": [], "rows": []}
    jobs: list[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
        ("rectangles", rectangle, sizes) for sizes in ((16384, 65536), (32768, 65536), (16384, 16384), (16384, 262144))
    ]
    jobs += [("rows", causal_row, (*row, most)) for row in ROWS for most in (16384, 65536, row[0])]
    for place, work, arguments in jobs:
        found[place].append(work(*arguments))
        print(json.dumps(found[place][-1]), flush=True)
        write_json(out, found)


if __name__ == "__main__":
    main()
