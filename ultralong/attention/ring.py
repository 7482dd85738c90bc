"""Ring attention: queries stay, keys and values go round; partial results are merged by their log-sum-exp.

Legend: B batch, T tokens a rank holds, N tokens of a circulating block, P ranks, H query heads, K kv heads,
D head size.

Ring attention (arXiv 2310.01889) over the zigzag layout. While a rank computes with one block of K and V, it receives
the next one. Output, log-sum-exp and all gradients are accumulated in float32; the backward pass uses the merged pair,
so that every block's part of the gradients simply adds up. What other ranks add to a block's dK and dV travels one hop
behind the block and is back at its owner after P - 1 hops.

Documents that don't see each other may have any lengths: two ranges of the row share at most one document (the one in
which the earlier range ends), so what a block adds to a range is at most one full rectangle, never a mask. And only
that document's keys and values circulate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Pending, copy_rows, ring_send_recv
from ultralong.attention.kernels import (
    Kernel,
    PartialKVGrad,
    attention_forward,
    backward_accumulate,
    backward_with_partials,
    partials_at,
)
from ultralong.attention.layout import Layout, TokenRange
from ultralong.attention.lse_merge import PartialRows, accumulation_dtype, merge
from ultralong.attention.protocol import OutLse
from ultralong.attention.scheme import Gradients, Scheme
from ultralong.attention.spec import AttentionSpec, VarlenSegments

Rectangle = tuple[slice, slice]  # local query rows, keys of the block; every row sees every key


def own_segments(ranges: Sequence[TokenRange], boundaries: Sequence[int]) -> VarlenSegments | None:
    """Documents among a rank's own tokens; ranges of one document are one segment, since both are in order."""
    held: dict[TokenRange, int] = {}  # tokens by document, in order
    for start, stop in ranges:
        at = start
        while at < stop:
            document = _document(boundaries, at)
            end = min(stop, document[1])
            held[document] = held.get(document, 0) + end - at
            at = end
    cu_seqlens = (0, *accumulate(held.values()))
    shared = frozenset(i for i, ((start, stop), count) in enumerate(held.items()) if count < stop - start)
    return VarlenSegments(cu_seqlens, cu_seqlens, shared) if len(held) > 1 else None


def circulating_ranges(ranges: Sequence[TokenRange], end: int, boundaries: Sequence[int] | None) -> list[TokenRange]:
    """Which of a rank's tokens other ranks see: of each range the document that continues after it.

    Args:
        ranges: Global ranges that the rank holds; what follows one is another rank's.
        end: End of the row.
        boundaries: Document boundaries when documents don't see each other, else None.
    """
    found = []
    for start, stop in ranges:
        begin, finish = (0, end) if boundaries is None else _document(boundaries, stop - 1)
        if finish > stop:
            found.append((max(start, begin), stop))
    return found


def rectangles(
    mine: Sequence[TokenRange], theirs: Sequence[TokenRange], boundaries: Sequence[int] | None
) -> list[Rectangle]:
    """What a rank's tokens see of another rank's: full rectangles, adjacent ones merged.

    Args:
        mine: Global ranges of the queries.
        theirs: Global ranges of the keys; none overlaps `mine`.
        boundaries: Document boundaries when documents don't see each other, else None.
    """
    found: list[tuple[int, int, int, int]] = []
    row = 0
    for start, stop in mine:
        column = 0
        for first, end in theirs:
            if first < start:
                begin, finish = (0, stop) if boundaries is None else _document(boundaries, end - 1)
                if finish > start:
                    found.append(
                        (row, row + min(stop, finish) - start, column + max(first, begin) - first, column + end - first)
                    )
            column += end - first
        row += stop - start
    return [(slice(a, b), slice(c, d)) for a, b, c, d in _merge_rectangles(found)]


def _apart(a: slice, b: slice) -> bool:
    return a.stop <= b.start or b.stop <= a.start


def _document(boundaries: Sequence[int], position: int) -> TokenRange:
    at = bisect_right(boundaries, position)
    return boundaries[at - 1], boundaries[at]


def _merge_rectangles(found: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Merge rectangles that share their rows and touch in their keys, or the other way round, until none is left."""
    for i, (a, b, c, d) in enumerate(found):
        for j, (e, f, g, h) in enumerate(found):
            if (a, b) == (e, f) and d == g:
                merged = (a, b, c, h)
            elif (c, d) == (g, h) and b == e:
                merged = (a, f, c, d)
            else:
                continue
            return _merge_rectangles([merged, *(r for n, r in enumerate(found) if n not in (i, j))])
    return sorted(found)


@dataclass(frozen=True, eq=False)
class Ring(Scheme):
    """Attention of a rank's queries with keys and values that circulate.

    Attributes:
        group: The ranks of the ring.
        layout: Which tokens each holds.
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None

    @cached_property
    def rank(self) -> int:
        """This process's place in the ring."""
        return dist.get_rank(self.group)

    @cached_property
    def segments(self) -> VarlenSegments | None:
        """Documents among this rank's own tokens."""
        return None if self.boundaries is None else own_segments(self.layout.ranges(self.rank), self.boundaries)

    @cached_property
    def _merged_rows(self) -> list[slice]:
        """Which queries see other ranks' tokens, ranges apart: only their results are merged from several calls."""
        found: list[slice] = []
        for rows in sorted((rows for seen in self.blocks for rows, _ in seen), key=lambda rows: rows.start):
            if found and rows.start <= found[-1].stop:
                found[-1] = slice(found[-1].start, max(found[-1].stop, rows.stop))
            else:
                found.append(rows)
        return found

    @cached_property
    def _merged_once(self) -> bool:
        """Whether no query's result is merged more than once: then q's own dtype rounds no more than float32 would."""
        rows = [rows for seen in self.blocks for rows, _ in seen]
        return self.layout.ranks == 2 and all(_apart(a, b) for a, b in combinations(rows, 2))

    def _merge_dtype(self, q: Tensor) -> torch.dtype:
        """The dtype in which results of several calls are kept until all have come."""
        return q.dtype if self._merged_once else accumulation_dtype(q.dtype)

    @cached_property
    def _circulating(self) -> list[list[TokenRange]]:
        """What circulates of each rank's tokens, by hops behind this rank (0: this rank's own)."""
        ranks = [(self.rank - hop) % self.layout.ranks for hop in range(self.layout.ranks)]
        return [circulating_ranges(self.layout.ranges(rank), self.layout.padded, self.boundaries) for rank in ranks]

    @cached_property
    def _own_circulating(self) -> list[slice]:
        """Where this rank holds those of its own tokens that circulate."""
        found, offset = [], 0
        for start, stop in self.layout.ranges(self.rank):
            found += [
                slice(offset + a - start, offset + b - start) for a, b in self._circulating[0] if start <= a < stop
            ]
            offset += stop - start
        return found

    @cached_property
    def blocks(self) -> list[list[Rectangle]]:
        """For every hop but the first, what this rank sees of the block that has come."""
        mine = self.layout.ranges(self.rank)
        return [rectangles(mine, ranges, self.boundaries) for ranges in self._circulating[1:]]

    def _block(self, k: Tensor, v: Tensor) -> Tensor:
        """This rank's circulating keys and values, (2, B, N, K, D)."""
        block = k.new_empty((2, k.shape[0], _length(self._circulating[0]), *k.shape[2:]))
        for side, x in zip(block, (k, v), strict=True):
            offset = 0
            for at in self._own_circulating:
                copy_rows(side[:, offset : offset + at.stop - at.start], x[:, at])
                offset += at.stop - at.start
        return block

    def _rotate(self, x: Tensor, hop: int, tag: int = 0) -> Pending:
        """Send a block (or its gradients) to the next rank, receive the previous one's, which has made `hop` hops."""
        tokens = _length(self._circulating[hop % self.layout.ranks])
        return ring_send_recv(x, self.group, tag, (*x.shape[:2], tokens, *x.shape[3:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """The pair's lse is (B, H, T)."""
        receiving: Pending | None = self._rotate(self._block(k, v), 1)
        out, lse = attention_forward(self.kernel, q, k, v, spec.with_segments(self.segments))
        merged, lse = PartialRows(out, self._merged_rows, self._merge_dtype(q)), lse.contiguous()
        for hop, visible in enumerate(self.blocks, start=1):
            assert receiving is not None
            block = receiving.wait()
            receiving = self._rotate(block, hop + 1) if hop < len(self.blocks) else None
            for rows, keys in visible:
                part, part_lse = attention_forward(
                    self.kernel, q[:, rows], block[0][:, keys], block[1][:, keys], spec.non_causal()
                )
                merged.set(rows, merge(merged.at(rows), lse[:, :, rows], part, part_lse))
        return merged.result(), lse

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
        """The blocks go round once more; their gradients follow one hop behind."""
        receiving: Pending | None = self._rotate(self._block(k, v), 1)
        own, full, grads_behind = spec.with_segments(self.segments), spec.non_causal(), None
        if fp32_grads:
            dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
            dq = backward_accumulate(self.kernel, dout, q, k, v, out, lse, own, dk, dv)
            partials = [(slice(0, k.shape[1]), dk, dv)]
        else:
            dq, dk, dv, partials = backward_with_partials(self.kernel, dout, q, k, v, out, lse, own)
        merged = PartialRows(dq, self._merged_rows, self._merge_dtype(q))
        for hop, visible in enumerate(self.blocks, start=1):
            assert receiving is not None
            block = receiving.wait()
            receiving = self._rotate(block, hop + 1) if hop < len(self.blocks) else None
            grads = torch.zeros_like(block, dtype=accumulation_dtype(k.dtype))
            for rows, keys in visible:
                tensors = (q[:, rows], block[0][:, keys], block[1][:, keys], out[:, rows], lse[:, :, rows])
                merged.at(rows).add_(
                    backward_accumulate(
                        self.kernel, dout[:, rows], *tensors, full, grads[0][:, keys], grads[1][:, keys]
                    )
                )
                del tensors
            if grads_behind is not None:
                grads += grads_behind.wait()
            grads_behind = self._rotate(grads, hop + 1, tag=1)
        assert grads_behind is not None
        self._add_returned_grads(grads_behind.wait(), partials)
        for keys, to_keys, to_values in () if fp32_grads else partials:
            dk[:, keys], dv[:, keys] = to_keys, to_values
        return merged.result(), dk, dv

    def _add_returned_grads(self, returned: Tensor, partials: list[PartialKVGrad]) -> None:
        """Add what the others computed for this rank's own keys and values, (2, B, N, K, D)."""
        offset = 0
        for at in self._own_circulating:
            for total, grad in zip(partials_at(partials, at), returned, strict=True):
                total += grad[:, offset : offset + at.stop - at.start]
            offset += at.stop - at.start


def _length(ranges: Sequence[TokenRange]) -> int:
    return sum(stop - start for start, stop in ranges)
