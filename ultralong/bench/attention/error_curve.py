"""Error of each scheme against exact attention by ranks: `ultralong bench error-curve --json FILE`.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, P ranks.

The measure is the root mean square of the error over that of the exact value, which is computed in float64 from the
same rounded inputs. Ulysses and gathered keys do what one process does, so their curves are flat. A ring merges P
partial results: in float32 at no visible cost; in bfloat16 each partial result comes rounded from its
kernel, and the curve rises with P and levels off, since each part's weight shrinks as parts are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention import make_attention_context
from ultralong.bench.attention.accuracy import exact_row, relative_errors
from ultralong.utils.local_ranks import run_ranks
from ultralong.utils.progress import progress

SCHEMES = ("ulysses", "gathered", "ring")
HEADS, KV_HEADS, HEAD_SIZE = 16, 16, 16


@dataclass(frozen=True)
class ErrorPoint:
    """Relative root-mean-square error of one scheme, type and number of ranks."""

    scheme: str
    dtype: str
    ranks: int
    out: float
    dq: float
    dk: float
    dv: float


def error_curve(
    ranks: Sequence[int],
    *,
    tokens: int,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    schemes: Sequence[str] = SCHEMES,
    seeds: int = 3,
    timeout: float = 600.0,
) -> list[ErrorPoint]:
    """Measure on this machine's CPU, with as many processes as ranks.

    Args:
        ranks: Numbers of ranks; 1 is one process without a scheme.
        tokens: Length of the row.
        dtypes: Names of torch types.
        schemes: Which schemes.
        seeds: Random inputs whose squared errors are averaged.
        timeout: Seconds for each number of ranks.

    Returns:
        A point for every combination; for one rank the scheme is `single`.
    """
    points: list[ErrorPoint] = []
    for world in progress(ranks, desc="error curve", unit="world"):
        points += run_ranks(_measure, world, tokens, tuple(dtypes), tuple(schemes), seeds, timeout=timeout)[0]
    return points


def _measure(
    _rank: int, world: int, tokens: int, dtypes: Sequence[str], schemes: Sequence[str], seeds: int
) -> list[ErrorPoint]:
    """One rank's part: every type and scheme at this number of ranks."""
    points = []
    group = dist.group.WORLD if world > 1 else None
    alone = make_attention_context(tokens, heads=HEADS, kv_heads=KV_HEADS)
    for name in dtypes:
        rows = [_row(seed, tokens, getattr(torch, name)) for seed in range(seeds)]
        exact = [exact_row(alone, row) for row in rows]
        for scheme in schemes if world > 1 else ("single",):
            context = make_attention_context(tokens, group, scheme, heads=HEADS, kv_heads=KV_HEADS)
            errors = [[*relative_errors(context, *row).values()] for row in zip(rows, exact)]
            mean = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
            points.append(ErrorPoint(scheme, name, world, *mean.tolist()))
    return points


def _row(seed: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and an output gradient (1, T, heads, D)."""
    make = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, tokens, heads, HEAD_SIZE, generator=make).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def table(points: Sequence[ErrorPoint]) -> str:
    """The points as lines of text."""
    lines = ["  ".join(f"{field.name:>9}" for field in fields(ErrorPoint))]
    for point in points:
        values = asdict(point).values()
        lines.append("  ".join(f"{value:9.2e}" if isinstance(value, float) else f"{value:>9}" for value in values))
    return "\n".join(lines)
