"""Gathered KV: queries stay, the keys and values that they see are sent to them, and their gradients are sent back.

Legend: B batch, T tokens a rank holds, P ranks, N keys of a rank's gathered KV buffer, H query heads, K kv heads,
D head size; s kv heads of one round.

Llama-3's context parallelism (arXiv 2407.21783, section 3.3.2), here with balance: a rank holds several ranges of the
row (zigzag, or assigned by work), and a range's keys end at its last token. The softmax of a query is one softmax of
one call, so nothing is merged and the error does not depend on P. Packed documents may have any lengths, and a rank is
only sent what its own documents' tokens see: a document that is on one rank is not sent at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Exchange, Group, copy_rows, exchange
from ultralong.attention.kernels import (
    Kernel,
    PartialKVGrad,
    attention_forward,
    backward_accumulate,
    backward_with_partials,
    partials_at,
)
from ultralong.attention.kv_plan import ExchangePlan, exchange_plan
from ultralong.attention.layout import Layout
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.protocol import OutLse
from ultralong.attention.scheme import Gradients, Scheme
from ultralong.attention.spec import AttentionSpec

BUFFER_BYTES = 2**30  # most bytes of the gathered K and V of one round of kv heads
TAGS = 4096  # more than the tensors that two ranks send each other at once


@dataclass
class KVBuffer:
    """Gathered K and V, (B, N, s, D) each, of the kv heads of one round."""

    heads: slice
    pair: tuple[Tensor, Tensor]
    receiving: Exchange

    def of(self, keys: slice) -> tuple[Tensor, Tensor]:
        """K and V of one kernel call, (B, keys, s, D)."""
        return self.pair[0][:, keys], self.pair[1][:, keys]


@dataclass
class BufferGrads:
    """Gradients of one round's gathered K and V, (B, N, s, D) each.

    Attributes:
        heads: The round's kv heads.
        rounded: dK and dV in k's dtype, of keys to which no other rank adds; None where all are partial sums.
        partials: Of keys to which other ranks add: where they are, and dK and dV in the accumulation dtype.
    """

    heads: slice
    rounded: tuple[Tensor, Tensor] | None
    partials: list[PartialKVGrad]

    def at(self, place: slice) -> list[Tensor]:
        """The partial sums of a range, to be sent or added to."""
        return partials_at(self.partials, place)

    def result(self) -> tuple[Tensor, Tensor]:
        """Both gradients, the sums rounded; in the accumulation dtype where all are sums."""
        if self.rounded is None:
            return self.partials[0][1], self.partials[0][2]
        for keys, *sums in self.partials:
            for side, total in zip(self.rounded, sums, strict=True):
                side[:, keys] = total
        return self.rounded


@dataclass(frozen=True, eq=False)
class Gathered(Scheme):
    """Attention of a rank's queries with the keys and values that they see, wherever those are held.

    Attributes:
        group: The ranks that share the row.
        layout: Which tokens each holds (its inner level, if any, has been undone by an exchange around this scheme).
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        head_chunks: Rounds of kv heads at least: while one is computed, the next one's keys are received and the last
            one's gradients are sent.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None
    head_chunks: int = 1

    @cached_property
    def _exchange_plans(self) -> dict[int | None, ExchangePlan]:
        return {}

    def exchange_plan(self, window: int | None) -> ExchangePlan:
        """This rank's exchange plan under a sliding window (None without), made once."""
        if window not in self._exchange_plans:
            rank = dist.get_rank(self.group)
            self._exchange_plans[window] = exchange_plan(self.layout, rank, self.boundaries, window)
        return self._exchange_plans[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """The pair's lse is (B, H, T)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
        group = q.shape[2] // k.shape[2]
        for buffer in self._rounds(k, v, spec.window):
            heads = slice(buffer.heads.start * group, buffer.heads.stop * group)
            for call in self.exchange_plan(spec.window).kv_plan.calls:
                part, part_lse = attention_forward(
                    self.kernel, q[:, call.queries, heads], *buffer.of(call.keys), spec.with_segments(call.segments)
                )
                if part.shape == out.shape:
                    out, lse = part, part_lse
                else:
                    copy_rows(out[:, call.queries, heads], part)
                    lse[:, heads, call.queries] = part_lse
                del part, part_lse  # else they are there while the next call makes its own
        return out, lse

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        *,
        fp32_grads: bool = False,
    ) -> Gradients:
        """Gathers again; the owner of a key adds all ranks' partial dK and dV in the accumulation dtype."""
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (
            torch.empty_like(
                x,
                dtype=accumulation_dtype(x.dtype) if fp32_grads else x.dtype,
                memory_format=torch.contiguous_format,
            )
            for x in (k, v)
        )
        group, under_way = q.shape[2] // k.shape[2], []
        for number, buffer in enumerate(self._rounds(k, v, spec.window)):
            heads = slice(buffer.heads.start * group, buffer.heads.stop * group)
            part, grads = self._round_backward(dout, q, out, lse, buffer, heads, spec, fp32_grads)
            if part.shape == dq.shape:
                dq = part
            else:
                copy_rows(dq[:, :, heads], part)
            del part
            under_way.append((grads, *self._return_grads(grads, spec.window, number)))
            if len(under_way) > 1:
                self._reduce(*under_way.pop(0), (dk, dv), spec.window)
        dk, dv = self._reduce(*under_way.pop(), (dk, dv), spec.window)
        return dq, dk, dv

    def _round_backward(
        self,
        dout: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        buffer: KVBuffer,
        heads: slice,
        spec: AttentionSpec,
        fp32_grads: bool,
    ) -> tuple[Tensor, BufferGrads]:
        """The gradient (B, T, h, D) of some query heads, and the gradients of their kv heads' buffer."""
        calls = self.exchange_plan(spec.window).kv_plan.calls
        dout, q, out, lse = dout[:, :, heads], q[:, :, heads], out[:, :, heads], lse[:, heads]
        if len(calls) == 1 and not fp32_grads:
            keys, spec = calls[0].keys, spec.with_segments(calls[0].segments)
            dq, dk, dv, partials = backward_with_partials(self.kernel, dout, q, *buffer.of(keys), out, lse, spec)
            return dq, BufferGrads(buffer.heads, (dk, dv), partials)
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in buffer.pair)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        for call in calls:
            part = backward_accumulate(
                self.kernel,
                dout[:, call.queries],
                q[:, call.queries],
                *buffer.of(call.keys),
                out[:, call.queries],
                lse[:, :, call.queries],
                spec.with_segments(call.segments),
                dk[:, call.keys],
                dv[:, call.keys],
            )
            if part.shape == dq.shape:
                dq = part
            else:
                copy_rows(dq[:, call.queries], part)
            del part
        return dq, BufferGrads(buffer.heads, None, [(slice(0, dk.shape[1]), dk, dv)])

    def _rounds(self, k: Tensor, v: Tensor, window: int | None) -> Iterator[KVBuffer]:
        """The gathered buffers of one round of kv heads after another; the next round's is being received meanwhile."""
        kv_heads = k.shape[2]
        size = 2 * k.shape[0] * self.exchange_plan(window).most_keys * k.shape[3] * k.element_size()
        step = max(1, min(-(-kv_heads // self.head_chunks), BUFFER_BYTES // size))
        rounds = [slice(a, min(a + step, kv_heads)) for a in range(0, kv_heads, step)]
        following = self._gather(k, v, rounds[0], window, 0)
        for number in range(1, len(rounds) + 1):
            buffer = following
            # All keys of a round are waited for, though its first call may need none of them. A transfer that starts
            # beside a kernel that fills the GPU gets in when that kernel ends, on every rank; where the ranks' first
            # calls differ in length, as zigzag's do, the others would wait for the longest
            # (notebooks/results/design_measurements.md, "Gathered KV").
            buffer.receiving.wait()
            if number < len(rounds):
                following = self._gather(k, v, rounds[number], window, number)
            yield buffer

    def _gather(self, k: Tensor, v: Tensor, heads: slice, window: int | None, number: int) -> KVBuffer:
        """Start sending K and V to those who need them, and copy this rank's own into its buffer."""
        plan, pair = self.exchange_plan(window), (k[:, :, heads], v[:, :, heads])
        no_copy = plan.is_local and all(x.is_contiguous() for x in pair)
        keys, values = pair if no_copy else (x.new_empty((x.shape[0], plan.kv_plan.tokens, *x.shape[2:])) for x in pair)
        sent = [[x[:, local] for x in pair for local in places] for places in plan.send]
        received = [[x[:, place] for x in (keys, values) for place in places] for places in plan.recv]
        receiving = exchange(sent, received, self.group, TAGS * number)
        for local, place in [] if no_copy else plan.own:
            for x, target in zip(pair, (keys, values), strict=True):
                copy_rows(target[:, place], x[:, local])
        return KVBuffer(heads, (keys, values), receiving)

    def _return_grads(self, grads: BufferGrads, window: int | None, number: int) -> tuple[list[list[Tensor]], Exchange]:
        """Start sending the owners of keys their partial gradients, and receiving what others have for this rank."""
        plan = self.exchange_plan(window)
        sent = [[part for side in zip(*map(grads.at, places)) for part in side] for places in plan.recv]
        received = [
            [
                torch.empty_like(part, memory_format=torch.contiguous_format)
                for side in zip(*map(grads.at, places))
                for part in side
            ]
            for places in plan.grad_recv
        ]
        return received, exchange(sent, received, self.group, TAGS * (2**16 + number))

    def _reduce(
        self,
        grads: BufferGrads,
        received: list[list[Tensor]],
        receiving: Exchange,
        targets: tuple[Tensor, Tensor],
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Add all ranks' partial gradients of this rank's keys and values, in rank order: timing has no effect."""
        receiving.wait()
        plan = self.exchange_plan(window)
        for parts, places in zip(received, plan.grad_recv, strict=True):
            for number, part in enumerate(parts):
                grads.at(places[number % len(places)])[number // len(places)].add_(part)
        sides = grads.result()
        if plan.is_local and all(
            x.shape == y.shape and x.dtype == y.dtype for x, y in zip(sides, targets, strict=True)
        ):
            return sides
        for side, target in zip(sides, targets, strict=True):
            for local, place in plan.own:
                target[:, local, grads.heads] = side[:, place]
        return targets
