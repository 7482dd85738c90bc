"""Speed of every kernel and scheme on this machine: `ultralong bench attention --lengths 131072 --json FILE`.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, P ranks.

Useful work is causal work without recomputation (`ultralong.bench.attention.timing.causal_flops`); the rate is per
GPU; `of one` is it over the rate of the same kernel on one GPU with the whole row. Packed rows hold documents that
don't see each other; their useful work is their own. At the first, short length the numbers are overhead: what a call
on idle GPUs costs beyond its share of one GPU's time. At the others the GPUs are busy while the host starts a call,
as they are in a training step.
"""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultralong.attention import AttentionContext, available_kernels, get_kernel, make_attention_context
from ultralong.bench.attention.accuracy import exact_row, relative_errors
from ultralong.bench.attention.options import HYBRIDS, SCHEMES, AttentionBench, AttentionResult
from ultralong.bench.attention.peers import PEERS, PeerMissing, peer
from ultralong.bench.attention.report import save
from ultralong.bench.attention.timing import Times, causal_flops, measure_passes
from ultralong.utils.local_ranks import nccl_options, run_ranks
from ultralong.utils.progress import progress


def bench_attention(options: AttentionBench, path: Path | None = None) -> list[AttentionResult]:
    """Measure in one process for each GPU (two on a CPU), or in torchrun's processes.

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


def _measure_all(
    rank: int, world: int, options: AttentionBench, device: str, path: Path | None
) -> list[AttentionResult]:
    """One rank's part."""
    kernels = [
        name
        for asked in options.kernels
        for name in ([n for n in available_kernels(device) if n != "reference"] if asked == "all" else [asked])
    ]
    schemes = SCHEMES if "all" in options.schemes else options.schemes
    schemes = (*schemes, *(f"{hybrid} {mesh}" for mesh in options.meshes for hybrid in HYBRIDS))
    lengths = ([options.latency_length] if options.latency_length else []) + list(options.lengths)
    cases = list(product(lengths, [False, True] if options.documents else [False], dict.fromkeys(kernels)))
    results: list[AttentionResult] = []

    def add(more: list[AttentionResult]) -> None:
        results.extend(more)
        if path is not None and rank == 0:
            save(path, options, results)

    exact: dict[tuple[int, bool], list[Tensor]] = {}
    for tokens, packed, kernel in progress(cases, desc="attention", unit="case", quiet=rank > 0):
        if options.check and tokens <= options.check_length and (tokens, packed) not in exact:
            edges = documents(tokens, options.documents) if packed else None
            few = options.for_check()
            context = make_attention_context(tokens, boundaries=edges, heads=few.heads, kv_heads=few.kv_heads)
            exact = {(tokens, packed): exact_row(context, _inputs(few, tokens, device))}  # for all kernels
        add(
            _case(
                world,
                options,
                device,
                kernel,
                tokens,
                packed,
                schemes if world > 1 else (),
                exact.get((tokens, packed)),
            )
        )
    if options.peers:
        for name, tokens in progress(list(product(PEERS, lengths)), desc="peers", unit="case", quiet=rank > 0):
            add([_peer(world, options, device, name, tokens)])
    return results


def documents(tokens: int, count: int) -> tuple[int, ...]:
    """Boundaries of `count` documents whose lengths spread over two orders of magnitude, the same each time."""
    make = torch.Generator().manual_seed(0)
    shares = torch.exp(torch.empty(count, dtype=torch.float64).uniform_(0.0, 4.6, generator=make))
    edges = (shares.cumsum(0) / shares.sum() * tokens).round().long().tolist()
    return tuple(sorted({0, *edges, tokens}))


def _inputs(options: AttentionBench, tokens: int, device: str) -> list[Tensor]:
    """q, k, v and an output gradient of a whole row, the same on every rank."""
    make = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(
            1, tokens, heads, options.head_size, generator=make, device=device, dtype=getattr(torch, options.dtype)
        )
        for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads)
    ]


def _context(
    options: AttentionBench, tokens: int, ranks: int, scheme: str, kernel: str, edges: tuple[int, ...] | None
) -> AttentionContext:
    alone = ranks == 1
    scheme, _, mesh = scheme.partition(" ")
    head_chunks = options.head_chunks if scheme in ("ulysses", "gathered") else None
    return make_attention_context(
        tokens,
        None if alone else _mesh(mesh, ranks) if mesh else dist.group.WORLD,
        "auto" if alone else scheme,
        kernel,
        edges,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_chunks=head_chunks,
    )


@functools.cache
def _mesh(written: str, ranks: int) -> DeviceMesh:
    """The mesh of two levels that is written as 2x4; made once, as its groups stay.

    Raises:
        ValueError: It has not as many ranks as there are.
    """
    outer, inner = (int(size) for size in written.split("x"))
    if outer * inner != ranks:
        raise ValueError(f"a mesh of {written} has {outer * inner} ranks, and there are {ranks}")
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (outer, inner))


def _case(
    world: int,
    options: AttentionBench,
    device: str,
    kernel: str,
    tokens: int,
    packed: bool,
    schemes: tuple[str, ...],
    exact: list[Tensor] | None,
) -> list[AttentionResult]:
    """One kernel at one length: one GPU, then every scheme; `exact` is the check's row in float32, if it is wanted."""
    edges = documents(tokens, options.documents) if packed else None
    row, results, alone, few = _inputs(options, tokens, device), [], None, options.for_check()
    for scheme in ("single", *schemes):
        ranks = 1 if scheme == "single" else world
        try:
            context = _context(options, tokens, ranks, scheme, kernel, edges)
            times = measure_passes(
                context.attend,
                [context.shard(x) for x in row[:3]],
                context.shard(row[3]),
                repeats=options.repeats,
                budget=options.budget,
                idle=tokens == options.latency_length,
            )
            errors = (
                {}
                if exact is None
                else relative_errors(
                    _context(few, tokens, ranks, scheme, kernel, edges), _inputs(few, tokens, device), exact
                )
            )
        except ValueError as error:
            results.append(AttentionResult(scheme, kernel, tokens, packed, ranks, note=str(error)))
            continue
        alone = times if scheme == "single" else alone
        ran = ", ".join(context.kernels_used)
        results.append(_result(options, scheme, ran, tokens, edges, ranks, times, alone, errors))
    return results


def _result(
    options: AttentionBench,
    name: str,
    kernel: str,
    tokens: int,
    edges: tuple[int, ...] | None,
    ranks: int,
    times: Times,
    alone: Times | None,
    errors: dict[str, float],
) -> AttentionResult:
    work = causal_flops(tokens, options.heads, options.head_size, edges)
    return AttentionResult(
        name,
        kernel,
        tokens,
        edges is not None,
        ranks,
        round(times.forward * 1e3, 4),
        round(times.backward * 1e3, 4),
        round(work / ranks / times.total / 1e12, 4),
        round(alone.total / ranks / times.total, 4) if alone else None,
        round((times.total - alone.total / ranks) * 1e3, 4) if alone else None,
        round(times.peak_gib, 2),
        errors,
        begun="idle" if tokens == options.latency_length else "busy",
    )


def _peer(world: int, options: AttentionBench, device: str, name: str, tokens: int) -> AttentionResult:
    """One peer at one length."""
    try:
        with peer(name, tokens) as (attend, kernel):
            context = make_attention_context(
                tokens, dist.group.WORLD, "ring", heads=options.heads, kv_heads=options.kv_heads
            )
            row = [context.shard(x).contiguous() for x in _inputs(options, tokens, device)]
            times = measure_passes(
                attend,
                row[:3],
                row[3],
                repeats=options.repeats,
                budget=options.budget,
                idle=tokens == options.latency_length,
            )
    except (PeerMissing, RuntimeError, NotImplementedError, ImportError) as error:
        return AttentionResult(name, "", tokens, False, world, note=str(error).splitlines()[0][:200])
    return _result(options, name, kernel, tokens, None, world, times, None, {})
