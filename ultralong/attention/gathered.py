"""Gathered KV: queries stay, the keys and values that they see come, few kernel calls; the gradients go back summed.

Legend: B batch, T tokens a rank holds, P ranks, N keys in front of a rank, H query heads, K kv heads, D head size; s kv
heads under way at a time.

Llama-3's context parallelism (arXiv 2407.21783, section 3.3.2), here with balance: a rank holds several pieces of the
row (zigzag, or dealt out by work), and a piece's keys end at its last token. The softmax of a query is one softmax of
one call, so nothing is merged and the error does not depend on P. Packed documents may have any lengths, and a rank is
only sent what its own documents' tokens see: a document that lies on one rank is not sent at all.

A round's computing begins when all of its keys have come, though the first call may need none of them. When they came
beside it, a forward pass on cuDNN took 156 ms on busy GPUs (131,072 tokens, two H200s), and 123 ms since they come
first. A transfer that starts beside a kernel which fills the GPU seems to get in when that one ends, on every rank:
where ranks' first calls differ in length, as zigzag's do, the others wait for the longest. At 32,768 tokens, where
computing takes as long as keys travel, it costs more than it gives (flash-attn 4: 81 to 89% of one GPU by machine, 89%
before).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Exchange, Group, copy_rows, exchange
from ultralong.attention.kernels import Kernel, Share, add_backward, attention_forward, backward_with_shares, sums_at
from ultralong.attention.kv_plan import Needs, needs
from ultralong.attention.layout import Layout
from ultralong.attention.lse_merge import accumulator
from ultralong.attention.scheme import Gradients, Pair, Scheme
from ultralong.attention.spec import Rule

BYTES_AT_ONCE = 2**30  # K and V in front of a rank in one round of kv heads
TAGS = 4096  # more than the tensors that two ranks send each other at once
Places = list[list[slice]]  # for every rank


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to whom, and what it gets.

    Attributes:
        needs: What this rank's queries see, and its calls.
        own: This rank's own tokens: where it holds them, and where they are in front of it.
        coming: Where what each rank sends is in front of this one; shares of gradients go back from there.
        going: Which of this rank's tokens each needs.
        landing: Where the shares of gradients that each rank sends back belong, in front of this one.
        most: Keys in front of the rank that has the most: all ranks take as many heads at a time.
    """

    needs: Needs
    own: list[tuple[slice, slice]]
    coming: Places
    going: Places
    landing: Places
    most: int

    @cached_property
    def alone(self) -> bool:
        """Whether what this rank holds is just what it needs: it stands in front of it as it is."""
        return (
            all(held == front for held, front in self.own)
            and not any(self.coming)
            and sum(held.stop - held.start for held, _ in self.own) == self.needs.tokens
        )


def traffic(layout: Layout, rank: int, boundaries: tuple[int, ...] | None, window: int | None) -> Traffic:
    """Who sends what to whom, seen from one rank.

    Args:
        layout: Which tokens each rank holds.
        rank: This one.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window, or None.
    """
    mine, held = needs(layout.pieces(rank), boundaries, window), layout.pieces(rank)
    own, places = mine.among(held), range(layout.ranks)
    coming: Places = [[] for _ in places]
    going: Places = [[] for _ in places]
    most = mine.tokens
    for other in (other for other in places if other != rank):
        theirs = needs(layout.pieces(other), boundaries, window)
        most = max(most, theirs.tokens)
        coming[other] = [front for _, front in mine.among(layout.pieces(other))]
        going[other] = [local for local, _ in theirs.among(held)]
    landing = [[_front(own, local) for local in going[other]] for other in places]
    return Traffic(mine, own, coming, going, landing, most)


def _front(own: list[tuple[slice, slice]], local: slice) -> slice:
    """Where some of a rank's own tokens, a part of one piece, are in front of it."""
    offset = next(place.start - held.start for held, place in own if held.start <= local.start < held.stop)
    return slice(local.start + offset, local.stop + offset)


@dataclass
class Front:
    """K and V in front of a rank, (B, N, s, D) each, for some kv heads."""

    heads: slice
    pair: tuple[Tensor, Tensor]
    coming: Exchange

    def of(self, call: slice) -> tuple[Tensor, Tensor]:
        """K and V of one call, (B, keys, s, D)."""
        return self.pair[0][:, call], self.pair[1][:, call]


@dataclass
class Shares:
    """Gradients of K and V in front of a rank, (B, N, s, D) each, for some kv heads.

    Attributes:
        heads: Which kv heads.
        final: What no other call adds to, rounded.
        wide: Where others add: keys, and dK and dV in the accumulating type.
    """

    heads: slice
    final: tuple[Tensor, Tensor] | None
    wide: list[Share]

    def at(self, place: slice) -> list[Tensor]:
        """The sums of a range that others have shares of, or want."""
        return sums_at(self.wide, place)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Both gradients, the sums rounded; in the accumulating type where all are sums."""
        if self.final is None:
            return self.wide[0][1], self.wide[0][2]
        for keys, *sums in self.wide:
            for side, total in zip(self.final, sums, strict=True):
                side[:, keys] = total
        return self.final


@dataclass(frozen=True, eq=False)
class Gathered(Scheme):
    """Attention of a rank's queries with the keys and values that they see, wherever those are held.

    Attributes:
        group: The ranks that share the row.
        layout: Which tokens each holds (its inner level, if any, has been undone by an exchange around this scheme).
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        head_chunks: Rounds of kv heads at least: while one is computed, the next one's keys come and the last one's
            gradients travel.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None
    head_chunks: int = 1

    @cached_property
    def _traffic(self) -> dict[int | None, Traffic]:
        return {}

    def traffic(self, window: int | None) -> Traffic:
        """This rank's traffic and calls under a sliding window (None without), made once."""
        if window not in self._traffic:
            self._traffic[window] = traffic(self.layout, dist.get_rank(self.group), self.boundaries, window)
        return self._traffic[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """The pair's lse is (B, H, T)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
        group = q.shape[2] // k.shape[2]
        for front in self._rounds(k, v, rule.window):
            of_query = slice(front.heads.start * group, front.heads.stop * group)
            for call in self.traffic(rule.window).needs.calls:
                part, part_lse = attention_forward(
                    self.kernel, q[:, call.rows, of_query], *front.of(call.keys), rule.with_spans(call.spans)
                )
                if part.shape == out.shape:
                    out, lse = part, part_lse
                else:
                    copy_rows(out[:, call.rows, of_query], part)
                    lse[:, of_query, call.rows] = part_lse
                del part, part_lse  # else they are there while the next call makes its own
        return out, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, *, wide: bool = False
    ) -> Gradients:
        """Gathers again; each rank's share of dK and dV is added by the owner in wide precision."""
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (
            torch.empty_like(x, dtype=accumulator(x.dtype) if wide else x.dtype, memory_format=torch.contiguous_format)
            for x in (k, v)
        )
        group, under_way = q.shape[2] // k.shape[2], []
        for number, front in enumerate(self._rounds(k, v, rule.window)):
            of_query = slice(front.heads.start * group, front.heads.stop * group)
            part, shares = self._round_backward(dout, q, out, lse, front, of_query, rule, wide)
            if part.shape == dq.shape:
                dq = part
            else:
                copy_rows(dq[:, :, of_query], part)
            del part
            under_way.append((shares, *self._share_out(shares, rule.window, number)))
            if len(under_way) > 1:
                self._collect(*under_way.pop(0), (dk, dv), rule.window)
        dk, dv = self._collect(*under_way.pop(), (dk, dv), rule.window)
        return dq, dk, dv

    def _round_backward(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, front: Front, of_query: slice, rule: Rule, wide: bool
    ) -> tuple[Tensor, Shares]:
        """The gradient (B, T, h, D) of some query heads, and the shares of their kv heads."""
        calls = self.traffic(rule.window).needs.calls
        if len(calls) == 1 and not wide:
            call = calls[0]
            dq, *final, sums = backward_with_shares(
                self.kernel,
                dout[:, :, of_query],
                q[:, :, of_query],
                *front.of(call.keys),
                out[:, :, of_query],
                lse[:, of_query],
                rule.with_spans(call.spans),
            )
            return dq, Shares(front.heads, tuple(final), sums)
        totals = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in front.pair]
        dq = torch.empty_like(q[:, :, of_query], memory_format=torch.contiguous_format)
        for call in calls:
            part = add_backward(
                self.kernel,
                *(x[:, call.rows, of_query] for x in (dout, q)),
                *front.of(call.keys),
                out[:, call.rows, of_query],
                lse[:, of_query, call.rows],
                rule.with_spans(call.spans),
                *(total[:, call.keys] for total in totals),
            )
            if part.shape == dq.shape:
                dq = part
            else:
                copy_rows(dq[:, call.rows], part)
            del part
        return dq, Shares(front.heads, None, [(slice(0, totals[0].shape[1]), *totals)])

    def _rounds(self, k: Tensor, v: Tensor, window: int | None) -> Iterator[Front]:
        """Rounds of kv heads with the K and V in front of this rank; the next round's are under way."""
        kv_heads = k.shape[2]
        size = 2 * k.shape[0] * self.traffic(window).most * k.shape[3] * k.element_size()
        step = max(1, min(-(-kv_heads // self.head_chunks), BYTES_AT_ONCE // size))
        rounds = [slice(a, min(a + step, kv_heads)) for a in range(0, kv_heads, step)]
        coming = self._gather(k, v, rounds[0], window, 0)
        for number in range(1, len(rounds) + 1):
            front = coming
            front.coming.wait()
            if number < len(rounds):
                coming = self._gather(k, v, rounds[number], window, number)
            yield front

    def _gather(self, k: Tensor, v: Tensor, heads: slice, window: int | None, number: int) -> Front:
        """Start sending K and V to those who need them; what this rank holds itself is put in front of it."""
        found, pair = self.traffic(window), (k[:, :, heads], v[:, :, heads])
        alone = found.alone and all(x.is_contiguous() for x in pair)
        front = pair if alone else tuple(x.new_empty((x.shape[0], found.needs.tokens, *x.shape[2:])) for x in pair)
        sent = [[x[:, local] for x in pair for local in places] for places in found.going]
        received = [[x[:, place] for x in front for place in places] for places in found.coming]
        coming = exchange(sent, received, self.group, TAGS * number)
        for local, place in [] if alone else found.own:
            for x, target in zip(pair, front, strict=True):
                copy_rows(target[:, place], x[:, local])
        return Front(heads, front, coming)

    def _share_out(self, shares: Shares, window: int | None, number: int) -> tuple[list[list[Tensor]], Exchange]:
        """Start sending the owners their parts, and receiving what others have for this rank."""
        found = self.traffic(window)
        sent = [[part for side in zip(*map(shares.at, places)) for part in side] for places in found.coming]
        received = [
            [
                torch.empty_like(part, memory_format=torch.contiguous_format)
                for side in zip(*map(shares.at, places))
                for part in side
            ]
            for places in found.landing
        ]
        return received, exchange(sent, received, self.group, TAGS * (2**16 + number))

    def _collect(
        self,
        shares: Shares,
        received: list[list[Tensor]],
        arriving: Exchange,
        grads: tuple[Tensor, Tensor],
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Add everyone's shares of this rank's dK and dV, in rank order so that timing does not matter."""
        arriving.wait()
        found = self.traffic(window)
        for parts, places in zip(received, found.landing, strict=True):
            for number, part in enumerate(parts):
                shares.at(places[number % len(places)])[number // len(places)].add_(part)
        sides = shares.whole()
        if found.alone and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(sides, grads, strict=True)):
            return sides
        for side, grad in zip(sides, grads, strict=True):
            for local, place in found.own:
                grad[:, local, shares.heads] = side[:, place]
        return grads
