"""Hooks into flash-attn 4's private functions; nothing else in this library reaches into a vendor's package.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

Both hooks call a copy of the package's backward function in which one of its module's names stands for something else
(`with_names`): the package itself is not changed, and where the name is missing the hook does nothing.

* Tiles (`with_tiles`, `sees_many_keys_keys`): on Hopper, larger tiles are faster where queries see many keys
  (notebooks/results/design_measurements.md, "flash-attn 4's tiles on Hopper").
* Float32 dK and dV (`Fp32Grads`): with grouped heads the backward pass accumulates dK and dV in float32 buffers, which
  a last small kernel scales, rounds and puts in order (`_bwd_postprocess_convert` in `flash_attn/cute/interface.py`,
  4.0.0b36). The hook reads the buffers before that.

On Hopper a buffer holds blocks of 64 keys in the order in which the threads of a warp group hold a matrix product's
result (CUTLASS's `CLayout_64xN`): columns by 8, then warps (16 keys each), then inside 16 keys and 8 columns the 8
rows, the 4 pairs of columns, the upper and the lower half, and the two columns of a pair. Whoever uses this compares
it with the package's own result first (`FlashAttn4.backward_accumulate`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.spec import AttentionSpec, VarlenSegments

CONVERT = "_bwd_postprocess_convert"
WARP_GROUP_ROWS = 64
HEAD_SIZE = 128
FORWARD_KEYS = 16384  # keys that a query sees, in the mean, from which the forward tile is used
BACKWARD_KEYS = 2048  # and the backward tile
FORWARD_TILE = (128, 160)  # queries, keys
# 80 rows are no multiple of a warp group's 64, so dQ is computed transposed.
BACKWARD_TILE = {"m_block_size": 80, "dQ_swapAB": True, "num_stages_dO": 1}
CHOOSE = "_tile_size_bwd_sm90"
_everywhere: list[bool] = []  # not empty inside of `tiles_everywhere`


def with_names(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function for which some of its module's names stand for something else; its module stays as it is."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def tiles_everywhere() -> Iterator[None]:
    """Take these tiles at any length: on a short row, so that their kernels are compiled before a long one is timed."""
    _everywhere.append(True)
    try:
        yield
    finally:
        _everywhere.pop()


def sees_many_keys(q: Tensor, k: Tensor, spec: AttentionSpec, many: int) -> bool:
    """Whether a call, q (B, T, H, D) against k (B, T, K, D), is one that a tile is for.

    Args:
        q: Queries.
        k: Keys.
        spec: What they see.
        many: Keys that a query must see in the mean.
    """
    if not spec.causal or spec.window is not None or spec.softcap is not None or q.shape[-1] != HEAD_SIZE:
        return False
    if _everywhere:
        return True
    segments = spec.segments or VarlenSegments((0, q.shape[1]), (0, k.shape[1]))
    pairs = sum((b - a) * (d - c - (b - a) / 2) for (a, b), (c, d) in zip(pairwise(segments.q), pairwise(segments.k)))
    return pairs >= many * q.shape[1]


def with_tiles(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the package's backward function that chooses these tiles; the function itself if it chooses otherwise.

    Args:
        backward: `_flash_attn_bwd` of `flash_attn.cute.interface`, which takes no tiles on Hopper.
    """
    choose = getattr(backward, "__globals__", {}).get(CHOOSE)
    if choose is None or CHOOSE not in backward.__code__.co_names:
        return backward

    def chosen(*arguments: Any, **options: Any) -> Any:
        return replace(choose(*arguments, **options), **BACKWARD_TILE)

    return with_names(backward, {CHOOSE: chosen})


@dataclass
class Fp32Buffers:
    """Float32 dK and dV in the buffers of one backward call.

    Attributes:
        buffers: For dK and dV: the buffer (B, K, n), or (K, n) packed, and the factor that belongs to it.
        block: Keys of a block: packed segments start at multiples of it.
        known_order: Whether the buffers are in the order of the module's docstring.
    """

    buffers: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    block: int = 0
    known_order: bool = True

    @property
    def readable(self) -> bool:
        """Whether both gradients can be read."""
        return self.known_order and len(self.buffers) == 2

    def add_to(self, total: Tensor, name: str) -> None:
        """Add a whole call's sums to `total` (B, T, K, D)."""
        buffer, scale = self.buffers[name]
        for row, of_row in zip(total, buffer, strict=True):
            add_ordered(row, of_row, scale)

    def add_segment(self, total: Tensor, name: str, segment: int, start: int) -> None:
        """Add the sums of one segment of a packed call, whose keys begin at `start`, to `total` (its T, K, D)."""
        buffer, scale = self.buffers[name]
        first = (start + segment * self.block) // self.block * self.block
        add_ordered(total, buffer[:, first * total.shape[2] :], scale)


class Fp32Grads:
    """The package's backward function, which also gives what it was about to round.

    Args:
        backward: `_flash_attn_bwd`.
        convert: What it calls `CONVERT`; None where it has no such function.
    """

    def __init__(self, backward: Callable[..., Any], convert: Callable[..., Any] | None) -> None:
        self._backward, self._convert = backward, convert
        code = getattr(self._backward, "__code__", None)
        names = () if code is None else code.co_names
        given = () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self._signature = None if self._convert is None else inspect.signature(self._convert)
        self.possible = self._convert is not None and CONVERT in names and {"dk", "dv"} <= {*given}

    def __call__(
        self, dk: Tensor, dv: Tensor, *tensors: Tensor, rounded: bool, **options: Any
    ) -> tuple[Tensor, Fp32Buffers]:
        """One backward call.

        Args:
            dk: Where the rounded dK goes, in the layout that the function wants.
            dv: Likewise.
            *tensors: The function's tensors.
            rounded: Whether the rounded gradients are wanted too.
            **options: Its options.

        Returns:
            The gradient of q, and the float32 buffers.
        """
        buffers, convert, signature = Fp32Buffers(), self._convert, self._signature
        assert convert is not None  # see `possible`
        assert signature is not None

        def listen(accum: Tensor, output: Tensor, scale: float, *rest: Any, **named: Any) -> None:
            name = "dk" if output is dk else "dv" if output is dv else ""
            if name:
                facts = signature.bind(accum, output, scale, *rest, **named).arguments
                buffers.known_order = buffers.known_order and _is_known(facts)
                buffers.block = facts.get("block_size", 0)
                buffers.buffers[name] = (accum, scale)
            if rounded or not name or not buffers.known_order:
                convert(accum, output, scale, *rest, **named)

        return with_names(self._backward, {CONVERT: listen})(*tensors, dk=dk, dv=dv, **options)[0], buffers


def _is_known(facts: dict[str, Any]) -> bool:
    """Whether a buffer is in the order of this module's docstring: Hopper, a warp group for 64 keys of a block."""
    groups, hdim = facts.get("atom_layout", 0), facts.get("hdim", 1)
    return (
        facts.get("arch", 0) // 10 == 9
        and not facts.get("swap_ab", True)
        and hdim % 32 == 0
        and facts.get("block_size") == WARP_GROUP_ROWS * groups
        and facts.get("num_threads") == 128 * groups
    )


def add_ordered(total: Tensor, buffer: Tensor, scale: float) -> None:
    """Add the first keys of a buffer, in order, to `total`.

    Args:
        total: (T, K, D) float32, changed in place.
        buffer: (K, n) with n at least D times T rounded up to 64.
        scale: Factor on the buffer.
    """
    tokens, kv_heads, size = total.shape
    even = tokens // WARP_GROUP_ROWS * WARP_GROUP_ROWS
    if even:
        target = total[:even].unflatten(0, (-1, 4, 2, 8)).unflatten(-1, (size // 8, 4, 2))
        source = _ordered(buffer[:, : even * size], size)
        torch.view_as_complex(target).add_(torch.view_as_complex(source), alpha=scale)  # two columns at a time: faster
    if tokens > even:
        last = _ordered(buffer[:, even * size : (even + WARP_GROUP_ROWS) * size], size)
        total[even:].add_(last.reshape(WARP_GROUP_ROWS, kv_heads, size)[: tokens - even], alpha=scale)


def _ordered(buffer: Tensor, size: int) -> Tensor:
    """(K, n) seen as (blocks of 64 keys, 4 warps, 2 halves, 8 rows, K, D / 8, 4 pairs, 2)."""
    parts = buffer.unflatten(1, (-1, size // 8, 4, 8, 4, 2, 2))  # (K, block, columns, warp, row, pair, half, column)
    return parts.permute(1, 3, 6, 4, 0, 2, 5, 7)
