"""Speed of every kernel and scheme on this machine: `python -m ultralong.bench.attention --lengths 131072 --json FILE`.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, P ranks.

Useful work is causal work without recomputation (`ultralong.bench.timing.causal_flops`); the rate is per GPU; `of one`
is it over the rate of the same kernel on one GPU with the whole row. Packed rows hold documents that don't see each
other; their useful work is their own. At the first, short length the numbers are overhead: what a call costs beyond
its share of one GPU's time.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention import available_kernels, get_kernel, make_context
from ultralong.bench.accuracy import exact_row, relative_errors
from ultralong.bench.peers import PEERS, PeerMissing, peer
from ultralong.bench.report import save, table
from ultralong.bench.timing import Times, causal_flops, measure
from ultralong.progress import progress
from ultralong.ranks import nccl_options, run_ranks

SCHEMES = ("ulysses", "gathered", "ring")


@dataclass(frozen=True)
class AttentionBench:
    """What to measure.

    Attributes:
        lengths: Row lengths in tokens.
        latency_length: A short length at which overhead is reported; 0 leaves it out.
        schemes: Schemes, or `("all",)`; `single` (one GPU) is always measured first.
        kernels: Kernels' names; "auto" stands for the fastest one for the call, "all" for every one that is present.
        documents: Also measure packed rows of so many documents of mixed length, masked; 0 leaves it out.
        peers: Also measure other projects' attention where installed.
        check: Also report errors against float32 (at lengths up to `check_length`).
        check_length: See `check`.
        heads: Query heads H.
        kv_heads: Kv heads K.
        head_size: D.
        dtype: Name of a torch type.
        ranks: Processes; all GPUs by default, two on a CPU.
        stages: Head chunks of Ulysses and of gathered keys; by default as `make_context` chooses.
        repeats: Timed runs of each case at most.
        budget: Seconds of timed runs after which no further one is started.
    """

    lengths: tuple[int, ...] = (131072, 524288)
    latency_length: int = 8192
    schemes: tuple[str, ...] = ("all",)
    kernels: tuple[str, ...] = ("auto",)
    documents: int = 32
    peers: bool = False
    check: bool = False
    check_length: int = 131072
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype: str = "bfloat16"
    ranks: int | None = None
    stages: int | None = None
    repeats: int = 5
    budget: float = 20.0

    def __post_init__(self) -> None:
        unknown = set(self.schemes) - {"all", *SCHEMES}
        if unknown:
            raise ValueError(f"schemes must be among all, {', '.join(SCHEMES)}; found {', '.join(sorted(unknown))}")
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths must be positive, found {self.lengths}")

    def for_this_machine(self) -> AttentionBench:
        """The same on a GPU; on a CPU small enough for one: at most 2,048 tokens, 8 heads of 32, float32."""
        if torch.cuda.is_available():
            return self
        lengths = tuple(sorted({min(length, 2048) for length in self.lengths}))
        kv_heads = max(1, 8 * self.kv_heads // self.heads)
        return replace(self, lengths=lengths, latency_length=min(self.latency_length, 256), heads=8, kv_heads=kv_heads,
                       documents=min(self.documents, 8), head_size=32, dtype="float32", ranks=self.ranks or 2,
                       budget=min(self.budget, 2.0))


@dataclass(frozen=True)
class AttentionResult:
    """One line of the table.

    Attributes:
        name: Scheme, `single`, or a peer.
        kernel: Kernel that ran.
        tokens: Row length.
        packed: Whether it held documents that don't see each other.
        ranks: GPUs that shared the row.
        forward_ms: Forward pass, slowest rank, median.
        backward_ms: Backward pass, likewise.
        tflops: Useful TF/s per GPU, forward and backward.
        of_one: Its ratio to the same kernel's on one GPU, same documents.
        overhead_ms: Time beyond one GPU's time divided by the ranks.
        peak_gib: Most memory of any rank.
        errors: Relative error against float32 of output, dq, dk, dv, when checked.
        note: Why there are no numbers.
    """

    name: str
    kernel: str
    tokens: int
    packed: bool
    ranks: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflops: float | None = None
    of_one: float | None = None
    overhead_ms: float | None = None
    peak_gib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""


def bench_attention(options: AttentionBench, path: Path | None = None) -> list[AttentionResult]:
    """Measure, in as many processes as this machine has GPUs (two on a CPU), or in torchrun's.

    Args:
        options: What to measure. On a machine without a GPU sizes are cut down first (`for_this_machine`).
        path: JSON file, written after every case, so that a run that is cut short keeps what it measured.

    Returns:
        The lines of the table, the same on every rank.

    Raises:
        ValueError: A kernel or scheme is unknown.
        ImportError: A named kernel is not installed; says how to install it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = options.for_this_machine()
    for name in set(options.kernels) - {"auto", "all"}:
        get_kernel(name, device)
    if dist.is_initialized():
        return _measure_all(dist.get_rank(), dist.get_world_size(), options, device, path)
    if dist.is_torchelastic_launched():
        return _in_torchrun(options, device, path)
    world = options.ranks or torch.cuda.device_count()
    return run_ranks(_measure_all, world, options, device, path, device=device, timeout=3600)[0]


def _in_torchrun(options: AttentionBench, device: str, path: Path | None) -> list[AttentionResult]:
    options_of_group = nccl_options() if device == "cuda" else None
    dist.init_process_group("nccl" if device == "cuda" else "gloo", pg_options=options_of_group)
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    try:
        return _measure_all(dist.get_rank(), dist.get_world_size(), options, device, path)
    finally:
        dist.destroy_process_group()


def _measure_all(rank: int, world: int, options: AttentionBench, device: str,
                 path: Path | None) -> list[AttentionResult]:
    """One rank's part."""
    kernels = [name for asked in options.kernels for name in
               ([n for n in available_kernels(device) if n != "reference"] if asked == "all" else [asked])]
    schemes = SCHEMES if "all" in options.schemes else options.schemes
    lengths = ([options.latency_length] if options.latency_length else []) + list(options.lengths)
    cases = list(product(dict.fromkeys(kernels), lengths, [False, True] if options.documents else [False]))
    results: list[AttentionResult] = []

    def add(more: list[AttentionResult]) -> None:
        results.extend(more)
        if path is not None and rank == 0:
            save(path, options, results)

    for kernel, tokens, packed in progress(cases, desc="attention", unit="case", quiet=rank > 0):
        add(_case(world, options, device, kernel, tokens, packed, schemes if world > 1 else ()))
    if options.peers:
        for name, tokens in progress(list(product(PEERS, lengths)), desc="peers", unit="case", quiet=rank > 0):
            add([_peer(world, options, device, name, tokens)])
    return results


def documents(tokens: int, count: int) -> tuple[int, ...]:
    """Boundaries of so many documents whose lengths spread over two orders of magnitude, the same each time."""
    make = torch.Generator().manual_seed(0)
    shares = torch.exp(torch.empty(count, dtype=torch.float64).uniform_(0.0, 4.6, generator=make))
    edges = (shares.cumsum(0) / shares.sum() * tokens).round().long().tolist()
    return tuple(sorted({0, *edges, tokens}))


def _inputs(options: AttentionBench, tokens: int, device: str) -> list[Tensor]:
    """q, k, v and an output gradient of a whole row, the same on every rank."""
    make = torch.Generator(device).manual_seed(0)
    return [torch.randn(1, tokens, heads, options.head_size, generator=make, device=device,
                        dtype=getattr(torch, options.dtype))
            for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads)]


def _case(world: int, options: AttentionBench, device: str, kernel: str, tokens: int, packed: bool,
          schemes: tuple[str, ...]) -> list[AttentionResult]:
    """One kernel at one length: one GPU, then every scheme."""
    edges = documents(tokens, options.documents) if packed else None
    row, results, alone, exact = _inputs(options, tokens, device), [], None, None
    for scheme in ("single", *schemes):
        ranks = 1 if scheme == "single" else world
        try:
            context = make_context(tokens, None if ranks == 1 else dist.group.WORLD, "auto" if ranks == 1 else scheme,
                                   kernel, edges, heads=options.heads, kv_heads=options.kv_heads,
                                   stages=options.stages if scheme in ("ulysses", "gathered") else None)
            times = measure(context.attend, [context.shard(x) for x in row[:3]], context.shard(row[3]),
                            repeats=options.repeats, budget=options.budget)
        except ValueError as error:
            results.append(AttentionResult(scheme, kernel, tokens, packed, ranks, note=str(error)))
            continue
        alone = times if scheme == "single" else alone
        errors: dict[str, float] = {}
        if options.check and tokens <= options.check_length:
            exact = exact_row(context, row) if exact is None else exact
            errors = relative_errors(context, row, exact)
        ran = ", ".join(context.kernels_used)
        results.append(_result(options, scheme, ran, tokens, edges, ranks, times, alone, errors))
    return results


def _result(options: AttentionBench, name: str, kernel: str, tokens: int, edges: tuple[int, ...] | None, ranks: int,
            times: Times, alone: Times | None, errors: dict[str, float]) -> AttentionResult:
    work = causal_flops(tokens, options.heads, options.head_size, edges)
    return AttentionResult(
        name, kernel, tokens, edges is not None, ranks, round(times.forward * 1e3, 4), round(times.backward * 1e3, 4),
        round(work / ranks / times.total / 1e12, 4), round(alone.total / ranks / times.total, 4) if alone else None,
        round((times.total - alone.total / ranks) * 1e3, 4) if alone else None, round(times.peak_gib, 2), errors)


def _peer(world: int, options: AttentionBench, device: str, name: str, tokens: int) -> AttentionResult:
    """One peer at one length."""
    try:
        with peer(name, tokens) as (attend, kernel):
            context = make_context(tokens, dist.group.WORLD, "ring", heads=options.heads, kv_heads=options.kv_heads)
            row = [context.shard(x).contiguous() for x in _inputs(options, tokens, device)]
            times = measure(attend, row[:3], row[3], repeats=options.repeats, budget=options.budget)
    except (PeerMissing, RuntimeError, NotImplementedError, ImportError) as error:
        return AttentionResult(name, "", tokens, False, world, note=str(error).splitlines()[0][:200])
    return _result(options, name, kernel, tokens, None, world, times, None, {})


def options_from(arguments: Sequence[str] | None = None) -> tuple[AttentionBench, Path | None]:
    """Options and result file from a command line."""
    default = AttentionBench()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(AttentionBench):
        value, name = getattr(default, entry.name), "--" + entry.name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(name, action="store_true")
        elif isinstance(value, tuple):
            parser.add_argument(name, default=",".join(map(str, value)), help="comma-separated (default: %(default)s)")
        else:
            kind = int if value is None else type(value)
            parser.add_argument(name, type=kind, default=value, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write machine, options and results to this file")
    found = vars(parser.parse_args(arguments))
    path = found.pop("json")
    for name in ("schemes", "kernels"):
        found[name] = tuple(found[name].split(","))
    found["lengths"] = tuple(int(part) for part in found["lengths"].split(","))
    return AttentionBench(**found), path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, path = options_from(arguments)
    options = options.for_this_machine()
    results = bench_attention(options, path)
    if int(os.environ.get("RANK", "0")) > 0:  # set by torchrun
        return
    print(table(results))


if __name__ == "__main__":
    main()
