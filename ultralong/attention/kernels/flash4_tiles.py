"""Tiles with which flash-attn 4 is faster on Hopper where queries see many keys.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

Its own choice for heads of 128 under a causal mask (4.0.0b36), 128 queries by 128 keys forward and 64 by 128 backward,
is good at short rows, where wide tiles compute more of what the mask hides; at long ones larger tiles load less. Rates
in TF/s, variants in turns, 32 query and 8 kv heads, whole rows and packed ones of 32 documents of mixed length:

| tokens | keys a query sees, in the mean | forward 128, 160 keys | backward 64, 80 queries | on |
|---|---|---|---|---|
| 131,072 | 65,536 | 666, 675 | 615, 621 | an H100 |
| 65,536 | 32,768 | 643, 655 | 602, 605 | an H200 |
| 32,768 | 16,384 | 641, 645 | 591, 595 | the same |
| 16,384 | 8,192 | 627, 630 | 572, 574 | the same |
| 524,288 packed | 17,500 | 634, 634 | 584, 605 | the same |
| 131,072 packed | 4,378 | 602, 598 | 534, 551 | the same |
| 65,536 packed | 2,189 | 546, 546 | 479, 487 | the same |

80 queries, the package's choice without a mask, are taken with one buffer for dO instead of two: with two they were at
most as good in all of these, and 0.5% slower than 64 at 65,536 on an H100. Of fewer keys neither was tried.

Calls without a mask, the ring's rectangles, keep the package's own. With these tiles the ring's backward pass over two
H200s took 321 ms at 131,072 tokens, 295 without (one dO buffer is what costs there); its forward pass took 106.5 and
108.9 ms on two machines, 109.1 without on a third: less than machines differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from ultralong.attention.kernels.flash4_sums import with_names
from ultralong.attention.spec import Rule, Spans

HEAD = 128
MANY = 16384  # keys that a query sees, in the mean, from which the forward tile is used
SOME = 2048  # and the backward tile
FORWARD = (128, 160)  # queries, keys
# 80 rows are no multiple of a warp group's 64, so dQ is computed transposed.
BACKWARD = {"m_block_size": 80, "dQ_swapAB": True, "num_stages_dO": 1}
CHOOSE = "_tile_size_bwd_sm90"
_always: list[bool] = []  # not empty inside of `everywhere`


@contextmanager
def everywhere() -> Iterator[None]:
    """Take these tiles at any length: on a short row, so that their kernels are compiled before a long one is timed."""
    _always.append(True)
    try:
        yield
    finally:
        _always.pop()


def sees_many(q: Tensor, k: Tensor, rule: Rule, many: int) -> bool:
    """Whether a call, q (B, T, H, D) against k (B, T, K, D), is one that a tile is for.

    Args:
        q: Queries.
        k: Keys.
        rule: What they see.
        many: Keys that a query must see in the mean.
    """
    if not rule.causal or rule.window is not None or rule.softcap is not None or q.shape[-1] != HEAD:
        return False
    if _always:
        return True
    spans = rule.spans or Spans((0, q.shape[1]), (0, k.shape[1]))
    pairs = sum((b - a) * (d - c - (b - a) / 2) for (a, b), (c, d) in zip(pairwise(spans.q), pairwise(spans.k)))
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
        return replace(choose(*arguments, **options), **BACKWARD)

    return with_names(backward, {CHOOSE: chosen})
