"""What ranks send each other, recorded from the production code: pictures of traffic come from here.

`recorded` wraps the collectives that the attention schemes use (all-to-all, batched point-to-point, all-gather,
reduce-scatter) for as long as its block lasts, in the calling process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ultralong.attention import collectives


@dataclass(frozen=True)
class Exchange:
    """One transfer from this rank to another.

    Attributes:
        step: Number of the call, from 0.
        kind: all_to_all, send, all_gather or reduce_scatter.
        source: Global rank that sends: this one.
        target: Global rank that receives.
        bytes: Bytes sent.
    """

    step: int
    kind: str
    source: int
    target: int
    bytes: int


@contextmanager
def recorded() -> Iterator[list[Exchange]]:
    """Record what this rank sends to others; what it keeps for itself is not traffic.

    Yields:
        The list that fills up while the block runs.
    """
    found: list[Exchange] = []
    recorder = _Recorder(found)
    # Where the schemes look each function up; collectives chose between torch's two names of one when it was imported.
    places: list[tuple[Any, str, Callable[..., None]]] = [
        (dist, "all_to_all_single", recorder.all_to_all),
        (dist, "batch_isend_irecv", recorder.point_to_point),
        (collectives, "_all_gather", recorder.all_gather),
        (dist, "reduce_scatter_tensor", recorder.reduce_scatter),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, note in places:
        setattr(module, name, recorder.wrap(getattr(module, name), note))
    try:
        yield found
    finally:
        for module, name, original in kept:
            setattr(module, name, original)


class _Recorder:
    def __init__(self, found: list[Exchange]) -> None:
        self.found, self.steps = found, 0

    def wrap(self, original: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            note(*arguments, **named)
            self.steps += 1
            return original(*arguments, **named)

        return call

    def _add(self, kind: str, target: int, size: int) -> None:
        if size and target != dist.get_rank():
            self.found.append(Exchange(self.steps, kind, dist.get_rank(), target, size))

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None, group: Any = None, async_op: bool = False,
    ) -> None:  # fmt: skip
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        rows = input_split_sizes or [input.shape[0] // len(members)] * len(members)
        row = input.element_size() * (input.numel() // max(1, input.shape[0]))
        for target, count in zip(members, rows, strict=True):
            self._add("all_to_all", target, count * row)

    def point_to_point(self, operations: list[Any]) -> None:
        for operation in operations:
            if operation.op is dist.isend:
                self._add("send", operation.peer, operation.tensor.numel() * operation.tensor.element_size())

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> None:
        for target in dist.get_process_group_ranks(group or dist.group.WORLD):
            self._add("all_gather", target, tensor.numel() * tensor.element_size())

    def reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> None:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        for target in members:
            self._add("reduce_scatter", target, tensor.numel() * tensor.element_size() // len(members))
