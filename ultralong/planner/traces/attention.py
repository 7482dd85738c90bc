"""One layer's attention traced through the real scheme: fake tensors, torch's fake process group, an allocating kernel.

Every rank of a fake group believes that the others are there; transfers take no time and bring nothing. So one process
sees what one rank of any number allocates, copies, computes and sends. The group is global to a process: where a row
is shared, `ultralong.planner.traces.child` runs this in a process of its own.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention import AttentionContext, make_attention_context
from ultralong.attention.balance import PairCounter, with_padding
from ultralong.attention.collectives import GroupOrMesh
from ultralong.attention.kv_plan import plan_kv
from ultralong.planner.traces.kernel import AllocatingKernel
from ultralong.planner.traces.shape_tensors import ShapeMode
from ultralong.planner.traces.tracker import Tracker


@dataclass(frozen=True)
class AttentionWorkload:
    """What one layer's attention is asked to do.

    Attributes:
        tokens: Length of the row.
        boundaries: Document boundaries when documents don't see each other, else None.
        rows: B.
        heads: H.
        kv_heads: K.
        head_dim: D.
        dtype: Name of the type, such as "bfloat16".
        scheme: As in `make_attention_context`.
        kernel: Name of the kernel whose allocations are traced.
        head_chunks: As in `make_attention_context`.
        outer: Processes that share the row; across hosts where there are two levels.
        inner: Processes of the second level.
    """

    tokens: int
    boundaries: tuple[int, ...] | None
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    scheme: str
    kernel: str
    head_chunks: int | None = None
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class PassTrace:
    """What one pass of one layer's attention does on one rank.

    Attributes:
        peak: Most bytes alive at once beside what it is given, its results included.
        flops: FLOP of the busiest rank's kernel calls.
        moved: Bytes that copies and sums read and write.
        operations: Kernels to start, those of attention itself included.
        transferred: Bytes sent or received, whichever is more.
    """

    peak: float
    flops: float
    moved: float
    operations: float
    transferred: float


@dataclass(frozen=True)
class AttentionTrace:
    """Both passes of one layer's attention on the rank with the most keys in front of it.

    Attributes:
        scheme: The one that was chosen or asked for.
        reason: Why.
        exchanges: Whether anything is sent.
        forward: The forward pass.
        backward: The backward pass.
    """

    scheme: str
    reason: str
    exchanges: bool
    forward: PassTrace
    backward: PassTrace


def trace_attention(workload: AttentionWorkload) -> AttentionTrace:
    """Trace both passes, in this process.

    Raises:
        ValueError: The trainer would refuse this row too; says why.
    """
    with _fake_groups(workload, 0) as group:
        busiest = _most_keys(_context(workload, group, AllocatingKernel(workload.kernel)))
    with _fake_groups(workload, busiest) as group:
        kernel = AllocatingKernel(workload.kernel)
        return _traced(workload, _context(workload, group, kernel), kernel)


def _context(workload: AttentionWorkload, group: GroupOrMesh | None, kernel: AllocatingKernel) -> AttentionContext:
    return make_attention_context(
        workload.tokens,
        group,
        workload.scheme,
        kernel,
        workload.boundaries,
        heads=workload.heads,
        kv_heads=workload.kv_heads,
        head_chunks=workload.head_chunks,
    )


@contextmanager
def _fake_groups(workload: AttentionWorkload, process: int) -> Iterator[GroupOrMesh | None]:
    """The groups as process number `process` sees them; None for a process alone."""
    world = workload.outer * workload.inner
    if world == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=process, world_size=world)
    try:
        if workload.inner == 1:
            yield dist.group.WORLD
            return
        member, host = process % workload.inner, process // workload.inner * workload.inner
        across = dist.new_group(list(range(member, world, workload.inner)))
        inside = dist.new_group(list(range(host, host + workload.inner)))
        yield across, inside
    finally:
        dist.destroy_process_group()


def _keys(context: AttentionContext) -> list[tuple[int, int]]:
    """For each rank of the layout its keys and its query-key pairs."""
    edges = context.boundaries or (0, context.layout.padded)
    pairs = PairCounter(with_padding(edges, context.layout.padded))
    ranks = [context.layout.ranges(rank) for rank in range(context.layout.ranks)]
    return [(plan_kv(ranges, context.boundaries).tokens, int(pairs.count(ranges).sum())) for ranges in ranks]


def _most_keys(context: AttentionContext) -> int:
    """The process with the most keys in front of it, and of those the one with the most work."""
    keys = _keys(context)
    return keys.index(max(keys)) * context.layout.inner


def _traced(workload: AttentionWorkload, context: AttentionContext, kernel: AllocatingKernel) -> AttentionTrace:
    dtype, pairs = getattr(torch, workload.dtype), [pairs for _, pairs in _keys(context)]
    behind = max(pairs) / max(1, pairs[context.process // context.layout.inner])  # another rank may have more to do

    def given(heads: int) -> Tensor:
        return torch.empty(workload.rows, context.local_tokens, heads, workload.head_dim, dtype=dtype)

    with ShapeMode():
        q, k, v, dout = (given(n) for n in (workload.heads, workload.kv_heads, workload.kv_heads, workload.heads))
        scheme, spec = context.scheme_and_spec(q, k, v)
        with Tracker() as tracker:
            out, lse = scheme.forward(q, k, v, spec)
            forward = _pass(tracker, kernel.flops_forward * behind, kernel.calls)
        kernel.calls = 0
        with Tracker() as tracker:
            grads = scheme.backward(dout, q, k, v, out, lse, spec)
            backward = _pass(tracker, kernel.flops_backward * behind, kernel.calls)
        del grads
    return AttentionTrace(context.scheme, context.reason, context.exchanges, forward, backward)


def _pass(tracker: Tracker, flops: float, calls: int) -> PassTrace:
    transferred = max(tracker.sent, tracker.received)
    return PassTrace(tracker.peak, flops, tracker.moved, tracker.operations + calls, transferred)


def between(low: AttentionTrace, high: AttentionTrace, part: float) -> AttentionTrace:
    """What lies so far on the straight line from one trace (0) through another (1)."""

    def passes(a: PassTrace, b: PassTrace) -> PassTrace:
        names = PassTrace.__dataclass_fields__
        return PassTrace(*(getattr(a, n) + part * (getattr(b, n) - getattr(a, n)) for n in names))

    return replace(high, forward=passes(low.forward, high.forward), backward=passes(low.backward, high.backward))
