"""Segments of a packed row one by one, for kernels without a packed call.

Legend: T tokens, H query heads.

A call of some thousand tokens does not fill a GPU to its end: while its last blocks run, the rest of the GPU idles.
So short segments run on streams of their own beside the long ones and each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ultralong.attention.spec import VarlenSegments

STREAMS = 4
# H T of a segment: 16,384 tokens of 32 heads, at 128 queries a block, are some 31 blocks for each of 132 processors.
SHORT = 2**19


def segment_slices(segments: VarlenSegments) -> list[tuple[slice, slice]]:
    """Query and key ranges of every segment that has queries."""
    edges = zip(segments.q, segments.q[1:], segments.k, segments.k[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in edges if b > a]


def for_each_segment(
    segments: VarlenSegments,
    q: Tensor,
    work: Callable[[int, slice, slice], None],
    keeps: Callable[[int], bool] | None = None,
) -> None:
    """Do `work(index, rows, keys)` for every segment that has queries.

    Args:
        segments: The segments.
        q: (B, T, H, D), whose device and heads count.
        work: Called in any order. What it makes it must write to tensors that were there before: memory that it
            allocates on another stream is that stream's again afterwards.
        keeps: For which segments it keeps what it allocates; they stay on the caller's stream. None: for none.
    """
    jobs = list(enumerate(segment_slices(segments)))
    if q.device.type != "cuda":
        for index, (rows, keys) in jobs:
            work(index, rows, keys)
        return
    short = [
        (index, rows, keys)
        for index, (rows, keys) in jobs
        if (keys.stop - keys.start) * q.shape[2] <= SHORT and not (keeps and keeps(index))
    ]
    beside = {index for index, *_ in short} if len(short) > 1 else set()
    caller, streams = torch.cuda.current_stream(q.device), _streams(q.device)
    for stream in streams if beside else ():
        stream.wait_stream(caller)  # also with what earlier calls left to the caller in these streams' memory
    for index, (rows, keys) in jobs:
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
