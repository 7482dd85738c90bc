"""Short contexts of a long text: which stretch each token is read again in, to see what the rest is worth to it.

T tokens of a text. A token's loss with the whole text before it, against its loss with only the last S to S + W - 1
tokens before it, says what lies further back is worth (LongPPL and LongCE, arXiv 2410.23771). Tokens are taken W at a
time, so that one short pass serves W of them: a text is read about (S + W) / W times as tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ultralong.utils.units import Tokens


@dataclass(frozen=True)
class LongCEConfig:
    """LongCE (arXiv 2410.23771): targets are weighted by what the long context is worth to them.

    A target's loss is multiplied by exp(loss with a short context - loss with all of it), at most `weight_cap`, taken
    from the model in training and without a gradient through the weight; targets with no more than a short context
    before them keep weight 1. The sum is still divided by the number of targets. Every step reads its rows once more,
    in short contexts and without a backward pass.

    Attributes:
        weight_cap: Largest weight; 0 switches LongCE off. The paper takes 5.
        short_context: Tokens of the short context at least.
        stride: Tokens that share a short context: rows are read about (short_context + stride) / stride times more.
    """

    weight_cap: float = 0.0
    short_context: Tokens = 4096
    stride: Tokens = 1024

    def __post_init__(self) -> None:
        if self.weight_cap and not 1 <= self.weight_cap < math.inf:
            raise ValueError(
                f"weight_cap must be 0 (off) or a number from 1, found {self.weight_cap}: the paper takes 5."
            )
        if self.short_context < 1 or self.stride < 1:
            raise ValueError(f"short_context and stride must be 1 or more, found {self}.")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that has a target with more than a short context before it."""
        return self.short_context + self.stride


@dataclass(frozen=True)
class ShortContext:
    """One stretch that is read as a text of its own.

    Attributes:
        row: Row of the batch that it is cut from.
        start: First token of the stretch.
        first: First place whose loss counts: `first - start + 1` tokens are read before its target.
        end: Place behind the last one, and behind the stretch.
    """

    row: int
    start: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """Tokens of the stretch."""
        return self.end - self.start


def short_contexts(
    labels: np.ndarray, boundaries: Sequence[int] | np.ndarray | None, short: int, stride: int
) -> list[ShortContext]:
    """The stretches of a batch of rows. Places that none of them covers read the same text either way.

    As in the authors' code: the target of place p is read with `short` to `short + stride - 1` tokens before it, and
    stretches start at multiples of `stride`. Their first block starts where the text does and so changes nothing; it is
    left out, as are stretches without a target.

    Args:
        labels: (B, T) shifted labels, -100 where there is no target.
        boundaries: (N + 1,) cumulative lengths of the texts of a row, which do not see each other, the same in every
            row; None where a row is one text.
        short: S, tokens of the short context.
        stride: W, places that share one.

    Returns:
        The stretches, row by row.

    Raises:
        ValueError: S or W is below 1.
    """
    if short < 1 or stride < 1:
        raise ValueError(f"A short context and its stride must be 1 token or more, found {short} and {stride}.")
    edges = (0, labels.shape[1]) if boundaries is None else [int(edge) for edge in boundaries]
    return [
        ShortContext(row, start, start + short - 1, min(start + short + stride - 1, end))
        for row in range(labels.shape[0])
        for begin, end in pairwise(edges)
        for start in range(begin + stride, end - short + 1, stride)
        if (labels[row, start + short - 1 : min(start + short + stride - 1, end)] != -100).any()
    ]


def equal_lengths(contexts: Sequence[ShortContext], tokens: int) -> Iterator[list[ShortContext]]:
    """Groups of stretches of one length, to be read together.

    Args:
        contexts: The stretches.
        tokens: Most tokens of a group of more than one.
    """
    lengths: dict[int, list[ShortContext]] = {}
    for context in contexts:
        lengths.setdefault(context.length, []).append(context)
    for length, alike in lengths.items():
        most = max(1, tokens // length)
        for first in range(0, len(alike), most):
            yield alike[first : first + most]
