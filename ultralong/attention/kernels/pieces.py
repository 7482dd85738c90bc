"""Pieces of a packed row one by one, for kernels without a packed call.

Legend: T tokens, H query heads.

A call of some thousand tokens does not fill a GPU to its end: while its last blocks run, the rest of the GPU waits.
So short pieces run on streams of their own beside the long ones and each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ultralong.attention.spec import Spans

STREAMS = 4
SHORT = 2**19  # H T of a piece: 16,384 tokens of 32 heads, 128 queries a block, are some 31 for each of 132 processors


def pieces_of(spans: Spans) -> list[tuple[slice, slice]]:
    """Query and key ranges of every piece that has queries."""
    edges = zip(spans.q, spans.q[1:], spans.k, spans.k[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in edges if b > a]


def each_piece(
    spans: Spans, q: Tensor, work: Callable[[int, slice, slice], None], keeps: Callable[[int], bool] | None = None
) -> None:
    """Do `work(index, rows, keys)` for every piece that has queries.

    Args:
        spans: The pieces.
        q: (B, T, H, D), whose device and heads count.
        work: Called in any order. What it makes it must write to tensors that were there before: memory that it
            allocates on another stream is that stream's again afterwards.
        keeps: For which pieces it keeps what it allocates; they stay on the caller's stream. None: for none.
    """
    pieces = list(enumerate(pieces_of(spans)))
    if q.device.type != "cuda":
        for index, (rows, keys) in pieces:
            work(index, rows, keys)
        return
    short = [
        (index, rows, keys)
        for index, (rows, keys) in pieces
        if (keys.stop - keys.start) * q.shape[2] <= SHORT and not (keeps and keeps(index))
    ]
    beside = {index for index, *_ in short} if len(short) > 1 else set()
    caller, streams = torch.cuda.current_stream(q.device), _streams(q.device)
    for stream in streams if beside else ():
        stream.wait_stream(caller)  # also with what earlier calls left to the caller in these streams' memory
    for index, (rows, keys) in pieces:
        if index not in beside:
            work(index, rows, keys)
    for number, (index, rows, keys) in enumerate(short if beside else ()):
        with torch.cuda.stream(streams[number % STREAMS]):
            work(index, rows, keys)
    for stream in streams if beside else ():
        caller.wait_stream(stream)


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]
