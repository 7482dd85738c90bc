"""The rates that the planner calculates with, measured on this machine: `ultralong bench rates --json FILE`.

Few numbers, chosen to be those that a training step is made of: matrix products by the size of the weight, what
everything else moves through memory, attention by kernel and length, the link to the host, and the optimizer's update.
`ultralong plan --machine FILE` then plans for this machine with measured rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ultralong.attention import available_kernels, make_attention_context
from ultralong.attention.kernels import get_kernel
from ultralong.attention.spec import AttentionSpec
from ultralong.bench.attention.timing import BACKWARD_WORK, measure_passes
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, write_json
from ultralong.utils.local_ranks import run_ranks
from ultralong.utils.progress import progress

WEIGHT_SIZES = (512, 1024, 2048, 4096, 8192)
TRAFFIC_BYTES = (2**24, 2**26, 2**28, 2**30)
LENGTHS = (8192, 32768, 131072, 524288)
HEAD_SIZES = (64, 128)
TOKENS = 32768
SLOW = ("efficient", "reference")  # references for the tests; nobody plans with them
Case = tuple[str, Callable[[], dict[str, Any]]]


def rates(
    device: str, lengths: tuple[int, ...] = LENGTHS, only: Collection[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Measure every rate on a device.

    Args:
        device: "cuda", or "cpu", where sizes are small and only show that it works.
        lengths: Row lengths for attention.
        only: Names of the rates to measure; all when empty.

    Returns:
        Lists of rows by name: `matmul` (size, tflops), `traffic` (bytes of an operation, gbps), `strided`
        (elements_per_second), `attention` (kernel, head_size, tokens, forward_tflops, backward_tflops), `launch`
        (seconds), `link` (gbps), `update` (seconds_per_parameter) and, with several GPUs, `exchange` (gbps that each
        sends to the others).
    """
    small = device == "cpu"
    most = 1 if small else None
    cases: list[Case] = [("matmul", partial(_matmul, size, device)) for size in WEIGHT_SIZES[:most]]
    cases += [("traffic", partial(_traffic, size, device)) for size in TRAFFIC_BYTES[:most]]
    cases.append(("strided", partial(_strided, device)))
    kernels = ["auto"] if small else [name for name in available_kernels(device) if name not in SLOW]
    cases += [
        ("attention", partial(_attention, kernel, head, tokens, device))
        for kernel in kernels
        for head in HEAD_SIZES
        for tokens in lengths
    ]
    cases += [("launch", partial(_launch, device)), ("update", partial(_update, device))]
    if not small:
        cases.append(("link", _link))
        if torch.cuda.device_count() > 1:
            cases.append(("exchange", _exchange))
    cases = [(name, run) for name, run in cases if not only or name in only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in cases}
    for name, run in progress(cases, desc="measure", unit="rate"):
        found[name].append(run())
    return found


def seconds(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median time of `work` once it is warm, waiting for the device on both sides."""
    times = []
    for attempt in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if attempt >= 2:
            times.append(time.perf_counter() - start)
    return median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matmul(size: int, device: str) -> dict[str, Any]:
    """Tokens times a weight, and the two products of its backward pass, in bfloat16."""
    tokens = TOKENS if device == "cuda" else 256
    x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4 * size, size, device=device, dtype=torch.bfloat16)
    y = torch.randn(tokens, 4 * size, device=device, dtype=torch.bfloat16)

    def work() -> None:
        torch.mm(x, weight.T)
        torch.mm(y, weight)
        torch.mm(y.T, x)

    return {"size": size, "tflops": 3 * 2 * tokens * 4 * size**2 / seconds(work, device) / 1e12}


def _traffic(size: int, device: str) -> dict[str, Any]:
    """A step's usual traffic, in float32 and bfloat16: a sum, a product, a change of type."""
    x = torch.randn(size // 4, device=device)
    y = x.to(torch.bfloat16)

    def work() -> None:
        x + y  # 4 + 2 read, 4 written
        x * x  # 4 read, 4 written, as the second reading is free
        x.to(torch.bfloat16)  # 4 read, 2 written
        y * y  # 2 read, 2 written

    moved = size // 4 * (10 + 12 + 6 + 6)  # as the planner counts: every operand
    return {"bytes": moved / 4, "gbps": moved / seconds(work, device) / 1e9}


def _strided(device: str) -> dict[str, Any]:
    """Elementwise operations as experts have them, in bfloat16: a mask and a factor of a row, halves of columns."""
    rows, columns = (2**17, 2048) if device == "cuda" else (64, 128)
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    factor, mask = torch.rand_like(x[:, :1]), torch.zeros(rows, 1, device=device, dtype=torch.bool)
    gate, up = x.chunk(2, dim=-1)

    def work() -> None:
        x.masked_fill_(mask, 0.0)
        x * factor
        gate * up

    return {"elements_per_second": 2.5 * x.numel() / seconds(work, device)}


def _attention(kernel: str, head_size: int, tokens: int, device: str) -> dict[str, Any]:
    """Causal attention of eight query heads on two kv heads; on long rows the rate does not depend on their number."""
    heads, kv_heads = 8, 2
    row: dict[str, Any] = {"kernel": kernel, "head_size": head_size, "tokens": tokens}
    q, dout, k, v = (  # (B, T, H, D) twice, (B, T, K, D) twice
        torch.randn(1, tokens, count, head_size, device=device, dtype=torch.bfloat16)
        for count in (heads, heads, kv_heads, kv_heads)
    )
    if kernel != "auto" and (
        reason := get_kernel(kernel, device).unsupported_reason(q, AttentionSpec(scale=head_size**-0.5))
    ):
        return row | {"note": reason}
    context = make_attention_context(tokens, kernel=kernel, heads=heads, kv_heads=kv_heads)
    times = measure_passes(context.attend, (q, k, v), dout, repeats=3, budget=6.0)
    flops = 2.0 * tokens**2 * heads * head_size
    return row | {
        "forward_tflops": flops / times.forward / 1e12,
        "backward_tflops": BACKWARD_WORK * flops / times.backward / 1e12,
    }


def _launch(device: str) -> dict[str, Any]:
    """What starting one operation from Python costs when its work is nothing."""
    x = torch.ones(1, device=device)

    def work() -> None:
        for _ in range(1000):
            x.add_(1)

    return {"seconds": seconds(work, device) / 1000}


def _update(device: str) -> dict[str, Any]:
    """AdamW on float32 parameters, in torch's fused form."""
    count = 2**28 if device == "cuda" else 2**20
    parameter = torch.nn.Parameter(torch.zeros(count, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return {"seconds_per_parameter": seconds(optimizer.step, device) / count}


def _link() -> dict[str, Any]:
    """Copies between pinned host memory and the device, the slower direction."""
    size = 2**30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    out = seconds(lambda: host.copy_(device, non_blocking=True), "cuda")
    back = seconds(lambda: device.copy_(host, non_blocking=True), "cuda")
    return {"gbps": size / max(out, back) / 1e9}


def _exchange() -> dict[str, Any]:
    """An all-to-all between all GPUs of this host, 1 GiB of each, as Ulysses makes them."""
    world = torch.cuda.device_count()
    return {"gpus": world, "gbps": min(run_ranks(_exchange_rate, world, device="cuda"))}


def _exchange_rate(rank: int, world: int) -> float:
    sent = torch.zeros(2**30, dtype=torch.uint8, device=f"cuda:{rank}")
    received = torch.empty_like(sent)
    took = seconds(lambda: dist.all_to_all_single(received, sent), "cuda")
    return sent.numel() * (world - 1) / world / took / 1e9


def measure_rates(
    lengths: tuple[int, ...], only: Collection[str], path: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """Measure the rates of this machine and write them to a file that `ultralong plan --machine` takes.

    Args:
        lengths: Row lengths for attention, in tokens; by default those of the device.
        only: Names of the rates to measure; all when empty. The others in the file stay.
        path: The file; None writes nothing.

    Returns:
        As `rates`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = rates(device, lengths or (LENGTHS if device == "cuda" else (256,)), only)
    if path is not None:
        before = read_json(path)["rates"] if only and path.exists() else {}
        write_json(path, {"machine": machine_facts(), "rates": before | found})
    return found
