"""Sliding windows for kernels that have none: an oblique band of the scores cut into causal squares.

Legend: B batch, T tokens, n tiles, t tokens of a tile, H query heads, K kv heads, D head size, w window.

Queries are taken in tiles of w tokens. Of its own tile a query sees what a causal square shows. Of the w - 1 keys
before the tile its first query sees all, the next one all but the first, and so on: a triangle that hangs from the
other corner, which is a causal square too once queries and keys are read backwards. All full tiles of a row have the
same shape, so each kind is one call of n tiles as its batch, and no score outside the band is computed but the masked
halves of these squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ultralong.attention.kernels.base import Kernel
from ultralong.attention.lse_merge import accumulation_dtype, merge
from ultralong.attention.spec import AttentionSpec

Forward = Callable[[Kernel, Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, Tensor]]
Backward = Callable[..., Tensor]


@dataclass(frozen=True)
class Tiles:
    """The same stretch of every tile: tokens `first + i * stride` and the `count - 1` after it, for each tile i."""

    first: int
    count: int
    tiles: int = 1
    stride: int = 0

    def take(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (B n, t, ...); may be a view."""
        return self._view(x).flatten(0, 1)

    def write(self, x: Tensor, part: Tensor, add: bool = False) -> None:
        """Set the tiles of x (B, T, ...) to `part` (B n, t, ...), or add it."""
        view = self._view(x)
        view.add_(part.reshape(view.shape)) if add else view.copy_(part.reshape(view.shape))

    def _view(self, x: Tensor) -> Tensor:  # (B, n, t, ...)
        if self.tiles == 1:
            return x[:, None, self.first : self.first + self.count]
        whole = x[:, self.first : self.first + self.tiles * self.stride]
        return whole.unflatten(1, (self.tiles, self.stride))[:, :, : self.count]


@dataclass(frozen=True)
class Piece:
    """One kernel call of a window.

    Attributes:
        queries: Its queries.
        keys: Its keys.
        causal: Causal, bottom-right aligned; else every query sees every key.
        backwards: Queries and keys are read from the last to the first.
        merges: The queries have results of an earlier piece, which this one's are merged with.
    """

    queries: Tiles
    keys: Tiles
    causal: bool
    backwards: bool = False
    merges: bool = False

    def take(self, tiles: Tiles, x: Tensor) -> Tensor:
        """(B, T, ...) to (B n, t, ...) in the order of the call."""
        part = tiles.take(x)
        return part.flip(1) if self.backwards else part

    def back(self, x: Tensor) -> Tensor:
        """(B n, t, ...) in the row's order."""
        return x.flip(1) if self.backwards else x


def band(queries: int, keys: int, window: int) -> list[Piece]:
    """Pieces of a call that is not causal: the last query sees the last `window` keys, each one before one more."""
    before = keys - queries
    whole = min(max(0, window - before), queries)  # queries that see every key
    pieces = [Piece(Tiles(0, whole), Tiles(0, keys), causal=False)] if whole else []
    if whole < queries:
        first = whole + before - window + 1
        pieces.append(Piece(Tiles(whole, queries - whole), Tiles(first, keys - first), causal=True, backwards=True))
    return pieces


def causal_band(queries: int, keys: int, window: int) -> list[Piece]:
    """Pieces of a causal call: each query sees its own key and the `window - 1` before it."""
    before, (full, rest) = keys - queries, divmod(queries, window)
    pieces: list[Piece] = []
    if full:
        pieces.append(Piece(Tiles(0, window, full, window), Tiles(before, window, full, window), causal=True))
    if full > 1 and window > 1:
        seen = Tiles(window, window - 1, full - 1, window), Tiles(before + 1, window - 1, full - 1, window)
        pieces.append(Piece(*seen, causal=True, backwards=True, merges=True))
    if rest:
        start = full * window
        pieces.append(Piece(Tiles(start, rest), Tiles(before + start, rest), causal=True))
        pieces += _keys_before(start, rest, before, window)
    return pieces + (_keys_before(0, window, before, window) if full else [])


def _keys_before(start: int, count: int, before: int, window: int) -> list[Piece]:
    """What the queries of one tile see of the keys before it."""
    end, count = before + start, min(count, window - 1)
    first = max(0, end - window + 1)
    if first == end or count == 0:
        return []
    return [
        Piece(
            Tiles(start + piece.queries.first, piece.queries.count),
            Tiles(first + piece.keys.first, piece.keys.count),
            piece.causal,
            piece.backwards,
            merges=True,
        )
        for piece in band(count, end - first, window - count)
    ]


def pieces_of(q: Tensor, k: Tensor, spec: AttentionSpec) -> list[Piece]:
    """The pieces of a call with a window and without segments."""
    assert spec.window is not None
    return (causal_band if spec.causal else band)(q.shape[1], k.shape[1], spec.window)


def forward_in_squares(
    attend: Forward, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call with a window, by calls without one; `attend` computes those."""
    dtype = q.dtype
    if kernel.computes_in_fp32(q):
        q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[1], q.shape[2]), dtype=accumulation_dtype(dtype))  # (B, T, H)
    for piece in pieces_of(q, k, spec):
        queries, keys, values = piece.take(piece.queries, q), piece.take(piece.keys, k), piece.take(piece.keys, v)
        part, part_lse = attend(kernel, queries, keys, values, _plain(spec, piece))
        part, part_lse = piece.back(part), piece.back(part_lse.transpose(1, 2))  # (B n, t, H, D), (B n, t, H)
        if piece.merges:
            there = piece.queries.take(lse).transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (B n, H, t)
            part = merge(piece.queries.take(out), there, part, part_lse.transpose(1, 2))
            part_lse = there.transpose(1, 2)
        piece.queries.write(out, part)
        piece.queries.write(lse, part_lse)
    return out.to(dtype), lse.transpose(1, 2)


def accumulate_in_squares(
    accumulate: Backward,
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Gradient of q; those of k and v are added to `dk` and `dv`. `accumulate` computes calls without a window."""
    dq, statistic = torch.zeros_like(q, memory_format=torch.contiguous_format), lse.transpose(1, 2)  # .., (B, T, H)
    for piece in pieces_of(q, k, spec):
        of_queries = [piece.take(piece.queries, x) for x in (dout, q, out, statistic)]
        keys, values = (piece.take(piece.keys, x) for x in (k, v))
        to_keys, to_values = (torch.zeros_like(x, dtype=dk.dtype) for x in (keys, values))
        part = accumulate(
            kernel,
            *of_queries[:2],
            keys,
            values,
            of_queries[2],
            of_queries[3].transpose(1, 2).contiguous(),
            _plain(spec, piece),
            to_keys,
            to_values,
        )
        piece.queries.write(dq, piece.back(part), add=True)
        piece.keys.write(dk, piece.back(to_keys), add=True)
        piece.keys.write(dv, piece.back(to_values), add=True)
    return dq


def _plain(spec: AttentionSpec, piece: Piece) -> AttentionSpec:
    plain = spec.non_causal()
    return plain if not piece.causal else AttentionSpec(plain.scale, causal=True, softcap=plain.softcap)
