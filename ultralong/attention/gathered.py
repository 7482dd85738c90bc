"""Gathered KV: queries stay, everyone's keys and values come, one kernel call a piece; the gradients go back summed.

Legend: B batch, T tokens a rank holds, P ranks, S = P T the padded row, H query heads, K kv heads, D head size; s kv
heads under way at a time.

Llama-3's context parallelism (arXiv 2407.21783, section 3.3.2), here with balance: a rank holds several pieces of the
row (zigzag, or dealt out by work), and each piece is one call whose keys end at its last token. The softmax of a query
is one softmax of one call, so nothing is merged and the error does not depend on P. Packed documents clip the keys at
the first document's start; they may have any lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Pending, all_gather, all_to_all, copy_rows
from ultralong.attention.kernels import Kernel, attention_backward, attention_forward
from ultralong.attention.layout import Layout
from ultralong.attention.merge import accumulator
from ultralong.attention.rule import Rule, Spans
from ultralong.attention.scheme import Gradients, Pair, Scheme

BYTES_AT_ONCE = 2**30  # gathered K and V of one round of kv heads


@dataclass(frozen=True)
class Call:
    """One kernel call: these of the rank's rows with these keys of the row."""

    rows: slice
    keys: slice
    spans: Spans | None


def clipped_calls(pieces: Sequence[tuple[int, int]], boundaries: Sequence[int] | None,
                  window: int | None = None) -> list[Call]:
    """The calls that attend exactly for a rank's pieces of the row.

    Args:
        pieces: Global ranges that the rank holds, in the order it holds them.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        window: Sliding window: keys that no query of a piece can see are left out.
    """
    edges = np.asarray(boundaries if boundaries is not None else [0, max(stop for _, stop in pieces)])
    calls, offset = [], 0
    for start, stop in pieces:
        begin = int(edges[np.searchsorted(edges, start, "right") - 1])
        begin = begin if window is None else max(begin, start - window + 1)
        inside = edges[(edges > start) & (edges < stop)].tolist()
        spans = Spans((0, *(edge - start for edge in inside), stop - start),
                      (0, *(edge - begin for edge in inside), stop - begin)) if inside else None
        calls.append(Call(slice(offset, offset + stop - start), slice(begin, stop), spans))
        offset += stop - start
    return calls


@dataclass(frozen=True, eq=False)
class Gathered(Scheme):
    """Attention of a rank's queries with the gathered keys and values of all.

    Attributes:
        group: The ranks that share the row.
        layout: Which tokens each holds (its inner level, if any, has been undone by an exchange around this scheme).
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
        stages: Rounds of kv heads at least: while one is computed, the next is gathered and the last one's gradients
            travel.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None
    stages: int = 1

    @cached_property
    def _calls(self) -> dict[int | None, list[Call]]:
        return {}

    def calls(self, window: int | None) -> list[Call]:
        """This rank's calls under a sliding window (None without), made once."""
        if window not in self._calls:
            pieces = self.layout.pieces(dist.get_rank(self.group))
            self._calls[window] = clipped_calls(pieces, self.boundaries, window)
        return self._calls[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Pair:
        """The pair's lse is (B, H, T)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
        group = q.shape[2] // k.shape[2]
        for heads, keys, values in self._gathered(k, v):
            of_query = slice(heads.start * group, heads.stop * group)
            for call in self.calls(rule.window):
                part, part_lse = attention_forward(self.kernel, q[:, call.rows, of_query], keys[:, call.keys],
                                                   values[:, call.keys], rule.with_spans(call.spans))
                out[:, call.rows, of_query], lse[:, of_query, call.rows] = part, part_lse
        return out, lse

    def attend_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                        rule: Rule) -> Gradients:
        """Gathers again; each rank's share of dK and dV is summed by the owner in wide precision."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        group, under_way = q.shape[2] // k.shape[2], []
        for heads, keys, values in self._gathered(k, v):
            of_query = slice(heads.start * group, heads.stop * group)
            shares = torch.zeros((2, *keys.shape), dtype=accumulator(k.dtype), device=k.device)  # (2, B, S, s, D)
            for call in self.calls(rule.window):
                dq[:, call.rows, of_query], dk_part, dv_part = attention_backward(
                    self.kernel, dout[:, call.rows, of_query], q[:, call.rows, of_query], keys[:, call.keys],
                    values[:, call.keys], out[:, call.rows, of_query], lse[:, of_query, call.rows],
                    rule.with_spans(call.spans))
                shares[0][:, call.keys] += dk_part
                shares[1][:, call.keys] += dv_part
            under_way.append((heads, self._share_out(shares)))
            if len(under_way) > 1:
                _collect(*under_way.pop(0), dk, dv)
        _collect(*under_way.pop(), dk, dv)
        return dq, dk, dv

    def _gathered(self, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rounds of kv heads with the row's K and V in order, (B, S, s, D); the next round is under way."""
        kv_heads, size = k.shape[2], 2 * k[:, :, 0].numel() * k.element_size() * self.layout.ranks
        step = max(1, min(-(-kv_heads // self.stages), BYTES_AT_ONCE // size))
        rounds = [slice(a, min(a + step, kv_heads)) for a in range(0, kv_heads, step)]
        coming = self._gather(k, v, rounds[0])
        for index, heads in enumerate(rounds):
            arrived = coming.wait()
            if index + 1 < len(rounds):
                coming = self._gather(k, v, rounds[index + 1])
            keys, values = self._in_order(arrived)
            yield heads, keys, values

    def _gather(self, k: Tensor, v: Tensor, heads: slice) -> Pending:
        return all_gather(torch.stack([k[:, :, heads], v[:, :, heads]]), self.group)  # (P, 2, B, T, s, D)

    def _in_order(self, gathered: Tensor) -> Tensor:
        """(P, 2, B, T, s, D) to (2, B, S, s, D)."""
        _, two, batch, tokens, *rest = gathered.shape
        row = gathered.new_empty((two, batch, self.layout.ranks * tokens, *rest))
        for place, held, part in self._places():
            copy_rows(row[:, :, place], gathered[held, :, :, part])
        return row

    def _share_out(self, shares: Tensor) -> Pending:
        """Start sending (2, B, S, s, D) to the owners as (P, 2, B, T, s, D)."""
        two, batch, tokens, *rest = shares.shape
        by_rank = shares.new_empty((self.layout.ranks, two, batch, tokens // self.layout.ranks, *rest))
        for place, held, part in self._places():
            copy_rows(by_rank[held, :, :, part], shares[:, :, place])
        return all_to_all(by_rank, self.group)

    def _places(self) -> Iterator[tuple[slice, int, slice]]:
        """For every piece: its range of the row, who holds it, and where among the holder's tokens."""
        for rank in range(self.layout.ranks):
            offset = 0
            for start, stop in self.layout.pieces(rank):
                yield slice(start, stop), rank, slice(offset, offset + stop - start)
                offset += stop - start


def _collect(heads: slice, pending: Pending, dk: Tensor, dv: Tensor) -> None:
    """Add everyone's shares of this rank's dK and dV, in rank order so that timing does not matter."""
    total = pending.wait().sum(0)  # (P, 2, B, T, s, D) -> (2, B, T, s, D)
    dk[:, :, heads], dv[:, :, heads] = total[0], total[1]
