"""Ulysses: a sequence-to-head all-to-all, attention over the whole row with some of the heads, and the way back.

Legend: B batch, T tokens a rank holds, P ranks, H query heads, K kv heads, D head size; M = lcm(K, P) kv heads after
each is repeated M / K times (1 where the degree divides them), N = M / P of them a rank, G = H / M query heads for
each; n and g those of one head chunk.

DeepSpeed-Ulysses (arXiv 2309.14509), with the head chunks of UPipe (arXiv 2602.21196): only the heads of one chunk, and
the exchange of the next one, are in the exchanged form at a time. What the backward pass needs is stored in the local
form and exchanged again, which costs one more exchange but no second copy. K and V of a chunk stay while the chunks
that share them run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Pending, all_to_all, copy_rows
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.protocol import OutLse
from ultralong.attention.scheme import Gradients, Scheme
from ultralong.attention.spec import AttentionSpec


def head_split(heads: int, kv_heads: int, degree: int) -> tuple[int, int]:
    """How many kv heads a rank gets, and how many query heads each of them serves: (N, G).

    Raises:
        ValueError: The heads can't be split over this degree; names the rule.
    """
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of kv heads, found {heads} and {kv_heads}")
    repeated = math.lcm(kv_heads, degree)
    if heads % repeated:
        raise ValueError(
            f"Ulysses can't split {heads} query and {kv_heads} kv heads over {degree} ranks: the query heads must be "
            f"a multiple of lcm({kv_heads}, {degree}) = {repeated}. Use scheme='gathered' or 'ring': they take any"
        )
    return repeated // degree, heads // repeated


def head_chunk_counts(heads: int, kv_heads: int, degree: int) -> list[int]:
    """The numbers of head chunks that split the heads evenly, rising (as in UPipe)."""
    kv, group = head_split(heads, kv_heads, degree)
    of_kv, of_group = ([s for s in range(1, count + 1) if count % s == 0] for count in (kv, group))
    return sorted({*of_kv, *(kv * s for s in of_group)})


@dataclass(frozen=True)
class HeadChunk:
    """The heads of one chunk: some of every rank's N kv heads, and of each one's G query heads."""

    kv: slice
    group: slice
    first: bool  # the first chunk with these kv heads
    last: bool  # the last one


@dataclass(frozen=True, eq=False)
class Ulysses(Scheme):
    """Sequence-to-head all-to-all around an inner scheme.

    Attributes:
        group: The ranks that share the heads; their tokens laid end to end are what the inner scheme holds.
        inner: Attention of the exchanged tokens (`Local`, or a scheme over other ranks: the two-level hybrid).
        head_chunks: Number of head chunks, one of `head_chunk_counts`.
    """

    group: Group
    inner: Scheme
    head_chunks: int = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """`forward` without a sink."""
        return self.forward(q, k, v, spec)

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
        """`backward` without a sink."""
        return self.backward(dout, q, k, v, out, lse, spec, fp32_grads=fp32_grads)[:3]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sink: Tensor | None = None) -> OutLse:
        """Out (B, T, H, D), and lse (B, H / P, P T) of this rank's heads over the group's tokens, chunk after chunk."""
        split = self._split(q, k)
        queries, by_key = split(q), (split(k), split(v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        outs = split(out)
        lses: list[Tensor] = []
        kv: list[Tensor] = []  # the current chunk's keys and values

        def inputs(chunk: HeadChunk) -> list[Tensor]:
            return [
                queries[:, :, :, chunk.kv, chunk.group],
                *((x[:, :, :, chunk.kv] for x in by_key) if chunk.first else ()),
            ]

        def compute(chunk: HeadChunk, arrived: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            kv[:] = arrived[1:] or kv
            keys, values = kv
            own = self._own(split, sink, chunk)
            part, lse = self.inner.forward(arrived[0], keys, values, spec, None if own is None else own.flatten())
            lses.append(lse)
            return [(part, outs[:, :, :, chunk.kv, chunk.group])]

        self._pipeline(split.chunks(self.head_chunks), inputs, compute)
        return out, torch.cat(lses, 1)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        sink: Tensor | None = None,
        *,
        fp32_grads: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Exchanges q, out, dout, k and v again, chunk by chunk, and the gradients back."""
        split, chunks = self._split(q, k), self._split(q, k).chunks(self.head_chunks)
        by_query, by_key = [split(x) for x in (q, out, dout)], [split(k), split(v)]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        kv_dtype = accumulation_dtype(k.dtype) if fp32_grads or split.copies > 1 else k.dtype
        dk, dv = (
            torch.empty_like(x, dtype=kv_dtype, memory_format=torch.contiguous_format) for x in by_key
        )  # (B, T, P, N, 1, D)
        dsink = None if sink is None else torch.zeros_like(sink)
        dqs, lses = split(dq), iter(lse.chunk(self.head_chunks, 1))
        kv: list[Tensor] = []  # the current chunk's keys and values
        sums: list[Tensor] = []  # and their gradients, of all chunks with these kv heads so far
        partial = kv_dtype != k.dtype or not all(chunk.first for chunk in chunks)  # several add up to one

        def inputs(chunk: HeadChunk) -> list[Tensor]:
            return [
                *(x[:, :, :, chunk.kv, chunk.group] for x in by_query),
                *((x[:, :, :, chunk.kv] for x in by_key) if chunk.first else ()),
            ]

        def compute(chunk: HeadChunk, arrived: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            kv[:] = arrived[3:] or kv
            own = self._own(split, sink, chunk)
            own_sink = None if own is None else own.flatten()
            (query, attended, grad), (keys, values) = arrived[:3], kv
            part, *kv_grads, sink_grad = self.inner.backward(
                grad, query, keys, values, attended, next(lses), spec, own_sink, fp32_grads=partial
            )
            own_dsink = self._own(split, dsink, chunk)
            if own_dsink is not None and sink_grad is not None:
                own_dsink.copy_(sink_grad.view_as(own_dsink))
            sums[:] = kv_grads if chunk.first else [a + b for a, b in zip(sums, kv_grads, strict=True)]
            results = [(part, dqs[:, :, :, chunk.kv, chunk.group])]
            if chunk.last:
                results += [(x.to(kv_dtype), y[:, :, :, chunk.kv]) for x, y in zip(sums, (dk, dv), strict=True)]
            return results

        self._pipeline(chunks, inputs, compute)
        dk, dv = (split.sum_copies(x) if fp32_grads else split.sum_copies(x).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv, dsink

    def _split(self, q: Tensor, k: Tensor) -> HeadSplit:
        degree = dist.get_world_size(self.group)
        return HeadSplit(q.shape[2], k.shape[2], degree, *head_split(q.shape[2], k.shape[2], degree))

    def _own(self, split: HeadSplit, per_head: Tensor | None, chunk: HeadChunk) -> Tensor | None:
        """The view (n, g) of a per-head vector (H,) that belongs to this rank's heads of a chunk."""
        if per_head is None:
            return None
        rank = dist.get_rank(self.group)
        return per_head.unflatten(0, (split.degree, split.kv, split.group))[rank, chunk.kv, chunk.group]

    def _pipeline(
        self,
        chunks: list[HeadChunk],
        inputs: Callable[[HeadChunk], list[Tensor]],
        compute: Callable[[HeadChunk, list[Tensor]], list[tuple[Tensor, Tensor]]],
    ) -> None:
        """Exchange each chunk's inputs, compute, exchange the results back; exchanges overlap with computation.

        Args:
            chunks: The head chunks in order.
            inputs: What a chunk needs, each (B, T, P, n, g, D).
            compute: From the exchanged tensors (B, P T, n g, D), results of this shape and where they belong.
        """
        returning: list[OutputAllToAll] = []
        following = _start_inputs(inputs(chunks[0]), self.group)
        for index, chunk in enumerate(chunks):
            arrived = following.wait()
            if index + 1 < len(chunks):
                following = _start_inputs(inputs(chunks[index + 1]), self.group)
            results = compute(chunk, arrived)
            returning.append(_start_outputs(results, self.group))
            if index:
                returning.pop(0).wait()
        returning.pop().wait()


@dataclass(frozen=True)
class HeadSplit:
    """How heads are split over ranks: `split(x)` shows a (B, T, heads, D) tensor as (B, T, P, N, G or 1, D)."""

    heads: int
    kv_heads: int
    degree: int
    kv: int  # N
    group: int  # G

    @property
    def copies(self) -> int:
        """How often each kv head is repeated."""
        return self.degree * self.kv // self.kv_heads

    def __call__(self, x: Tensor) -> Tensor:
        """Show the heads of queries or of keys by the rank they go to; kv heads are repeated where they must be."""
        if x.shape[2] == self.heads and self.heads != self.kv_heads:
            return x.unflatten(2, (self.degree, self.kv, self.group))
        x = x if self.copies == 1 else x.repeat_interleave(self.copies, 2)
        return x.unflatten(2, (self.degree, self.kv, -1))

    def sum_copies(self, grad: Tensor) -> Tensor:
        """(B, T, P, N, 1, D) to (B, T, K, D): what the copies of a kv head received, added."""
        grad = grad.flatten(2, 4)  # (B, T, M, D)
        return grad if self.copies == 1 else grad.unflatten(2, (self.kv_heads, -1)).sum(3)

    def chunks(self, count: int) -> list[HeadChunk]:
        """The head chunks in order, those with the same kv heads one after another."""
        blocks = min(count, self.kv)
        parts = count // blocks
        kv, group = self.kv // blocks, self.group // parts
        return [
            HeadChunk(slice(i * kv, (i + 1) * kv), slice(j * group, (j + 1) * group), j == 0, j == parts - 1)
            for i in range(blocks)
            for j in range(parts)
        ]


@dataclass
class InputAllToAll:
    """Sequence-to-head all-to-all under way."""

    pending: Pending
    heads: list[int]

    def wait(self) -> list[Tensor]:
        """The tensors, each (B, P T, n g, D)."""
        x = self.pending.wait().transpose(0, 1).flatten(1, 2)  # (P, B, T, h, D) -> (B, P T, h, D)
        return list(x.split(self.heads, 2))


@dataclass
class OutputAllToAll:
    """Head-to-sequence all-to-all under way: results, and where each belongs, (B, T, P, n, g, D)."""

    pending: list[tuple[Pending, Tensor]]

    def wait(self) -> None:
        """Write each result into its place."""
        for pending, target in self.pending:
            x = pending.wait().permute(1, 2, 0, 3, 4)  # (P, B, T, h, D) -> (B, T, P, h, D)
            copy_rows(target, x.unflatten(3, target.shape[3:5]))


def _start_inputs(tensors: list[Tensor], group: Group) -> InputAllToAll:
    """Start one sequence-to-head all-to-all of several (B, T, P, n, g, D) tensors."""
    heads = [x.shape[3] * x.shape[4] for x in tensors]
    batch, tokens, degree, *_, size = tensors[0].shape
    buffer = tensors[0].new_empty((degree, batch, tokens, sum(heads), size))
    for x, slot in zip(tensors, buffer.split(heads, 3), strict=True):
        copy_rows(slot.unflatten(3, x.shape[3:5]), x.permute(2, 0, 1, 3, 4, 5))  # (P, B, T, n, g, D)
    return InputAllToAll(all_to_all(buffer, group), heads)


def _start_outputs(results: list[tuple[Tensor, Tensor]], group: Group) -> OutputAllToAll:
    """Start the head-to-sequence all-to-alls of several results (B, P T, n g, D); a single row needs no copy."""
    degree = dist.get_world_size(group)
    parts = [x.unflatten(1, (degree, -1)).transpose(0, 1).contiguous() for x, _ in results]  # (P, B, T, h, D)
    return OutputAllToAll([(all_to_all(part, group), target) for part, (_, target) in zip(parts, results, strict=True)])
