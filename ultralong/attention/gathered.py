"""Gathered KV: queries stay, the keys and values that they see come, few kernel calls; the gradients go back summed.

Legend: B batch, T tokens a rank holds, P ranks, N keys in front of a rank, H query heads, K kv heads, D head size; s kv
heads under way at a time.

Llama-3's context parallelism (arXiv 2407.21783, section 3.3.2), here with balance: a rank holds several pieces of the
row (zigzag, or dealt out by work), and a piece's keys end at its last token. The softmax of a query is one softmax of
one call, so nothing is merged and the error does not depend on P. Packed documents may have any lengths, and a rank is
only sent what its own documents' tokens see: a document that lies on one rank is not sent at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Parts, copy_rows, exchange
from ultralong.attention.kernels import Kernel, add_backward, attention_forward
from ultralong.attention.layout import Layout
from ultralong.attention.merge import accumulator
from ultralong.attention.needs import Needs, needs
from ultralong.attention.rule import Rule
from ultralong.attention.scheme import Gradients, Pair, Scheme

BYTES_AT_ONCE = 2**30  # K and V in front of a rank in one round of kv heads


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to whom, and what it gets.

    Attributes:
        needs: What this rank's queries see, and its calls.
        own: This rank's own tokens: where it holds them, and where they are in front of it.
        coming: For every rank, where what it sends is in front of this one.
        going: For every rank, which of this one's tokens it needs.
    """

    needs: Needs
    own: list[tuple[slice, slice]]
    coming: list[list[slice]]
    going: list[list[slice]]


def traffic(layout: Layout, rank: int, boundaries: tuple[int, ...] | None, window: int | None) -> Traffic:
    """Who sends what to whom, seen from one rank.

    Args:
        layout: Which tokens each rank holds.
        rank: This one.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window, or None.
    """
    mine, held = needs(layout.pieces(rank), boundaries, window), layout.pieces(rank)
    others = [other for other in range(layout.ranks) if other != rank]
    coming: list[list[slice]] = [[] for _ in range(layout.ranks)]
    going: list[list[slice]] = [[] for _ in range(layout.ranks)]
    for other in others:
        coming[other] = [front for _, front in mine.among(layout.pieces(other))]
        going[other] = [local for local, _ in needs(layout.pieces(other), boundaries, window).among(held)]
    return Traffic(mine, mine.among(held), coming, going)


@dataclass(frozen=True, eq=False)
class Gathered(Scheme):
    """Attention of a rank's queries with the keys and values that they see, wherever those are held.

    Attributes:
        group: The ranks that share the row.
        layout: Which tokens each holds (its inner level, if any, has been undone by an exchange around this scheme).
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        stages: Rounds of kv heads at least: while one is computed, the next one's keys come and the last one's
            gradients travel.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None
    stages: int = 1

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
        for heads, keys, values in self._gathered(k, v, rule.window):
            of_query = slice(heads.start * group, heads.stop * group)
            for call in self.traffic(rule.window).needs.calls:
                part, part_lse = attention_forward(self.kernel, q[:, call.rows, of_query], keys[:, call.keys],
                                                   values[:, call.keys], rule.with_spans(call.spans))
                out[:, call.rows, of_query], lse[:, of_query, call.rows] = part, part_lse
        return out, lse

    def attend_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, *,
                        wide: bool = False) -> Gradients:
        """Gathers again; each rank's share of dK and dV is added by the owner in wide precision."""
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.empty_like(x, dtype=accumulator(x.dtype) if wide else x.dtype,
                                   memory_format=torch.contiguous_format) for x in (k, v))
        group, under_way = q.shape[2] // k.shape[2], []
        for heads, keys, values in self._gathered(k, v, rule.window):
            of_query = slice(heads.start * group, heads.stop * group)
            shares = torch.zeros((2, *keys.shape), dtype=accumulator(k.dtype), device=k.device)  # (2, B, N, s, D)
            for call in self.traffic(rule.window).needs.calls:
                dq[:, call.rows, of_query] = add_backward(
                    self.kernel, *(x[:, call.rows, of_query] for x in (dout, q)), keys[:, call.keys],
                    values[:, call.keys], out[:, call.rows, of_query], lse[:, of_query, call.rows],
                    rule.with_spans(call.spans), shares[0][:, call.keys], shares[1][:, call.keys])
            under_way.append((heads, *self._share_out(shares, rule.window)))
            if len(under_way) > 1:
                self._collect(*under_way.pop(0), dk, dv, rule.window)
        self._collect(*under_way.pop(), dk, dv, rule.window)
        return dq, dk, dv

    def _gathered(self, k: Tensor, v: Tensor, window: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rounds of kv heads with the K and V in front of this rank, (B, N, s, D); the next round is under way."""
        kv_heads = k.shape[2]
        size = 2 * k.shape[0] * self.traffic(window).needs.tokens * k.shape[3] * k.element_size()
        step = max(1, min(-(-kv_heads // self.stages), BYTES_AT_ONCE // size))
        rounds = [slice(a, min(a + step, kv_heads)) for a in range(0, kv_heads, step)]
        coming = self._gather(k, v, rounds[0], window)
        for index, heads in enumerate(rounds):
            front = self._in_front(coming.wait(), k[:, :, heads], v[:, :, heads], window)
            if index + 1 < len(rounds):
                coming = self._gather(k, v, rounds[index + 1], window)
            yield heads, front[0], front[1]

    def _gather(self, k: Tensor, v: Tensor, heads: slice, window: int | None) -> Parts:
        """Start sending K and V to those who need them."""
        found = self.traffic(window)
        outgoing = [[x[:, at, heads] for x in (k, v) for at in places] for places in found.going]
        shape = (k.shape[0], heads.stop - heads.start, k.shape[3])
        return exchange(outgoing, [2 * _length(places) * shape[0] * shape[1] * shape[2] for places in found.coming],
                        k, self.group)

    def _in_front(self, arrived: tuple[Tensor, ...], k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """What came and what this rank holds itself, (2, B, N, s, D)."""
        found = self.traffic(window)
        batch, _, heads, size = k.shape
        front = k.new_empty((2, batch, found.needs.tokens, heads, size))
        for local, place in found.own:
            copy_rows(front[0][:, place], k[:, local])
            copy_rows(front[1][:, place], v[:, local])
        for flat, places in zip(arrived, found.coming, strict=True):
            for part, place, side in _parts(flat, places, (batch, heads, size)):
                front[side][:, place] = part
        return front

    def _share_out(self, shares: Tensor, window: int | None) -> tuple[Parts, Tensor]:
        """Start sending (2, B, N, s, D) to the owners; this rank's own part (2, B, T, s, D) stays."""
        found = self.traffic(window)
        outgoing = [[side[:, place] for side in shares for place in places] for places in found.coming]
        _, batch, _, heads, size = shares.shape
        pending = exchange(outgoing, [2 * _length(places) * batch * heads * size for places in found.going], shares,
                           self.group)
        own = shares.new_empty((2, batch, self.layout.held, heads, size))
        for local, place in found.own:
            own[:, :, local] = shares[:, :, place]
        return pending, own

    def _collect(self, heads: slice, pending: Parts, own: Tensor, dk: Tensor, dv: Tensor, window: int | None) -> None:
        """Add everyone's shares of this rank's dK and dV, in rank order so that timing does not matter."""
        _, batch, _, count, size = own.shape
        for flat, places in zip(pending.wait(), self.traffic(window).going, strict=True):
            for part, local, side in _parts(flat, places, (batch, count, size)):
                own[side][:, local] += part
        dk[:, :, heads], dv[:, :, heads] = own[0], own[1]


def _length(places: list[slice]) -> int:
    return sum(place.stop - place.start for place in places)


def _parts(flat: Tensor, places: list[slice], shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, slice, int]]:
    """Cut what one rank sent into (B, tokens, s, D) parts: all of keys, then all of values."""
    batch, heads, size = shape
    lengths = [(place.stop - place.start) * batch * heads * size for place in places]
    for index, part in enumerate(flat.split(lengths * 2)):
        yield part.view(batch, -1, heads, size), places[index % len(places)], index // len(places)
