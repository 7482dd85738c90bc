"""Steps over rows of several lengths: a stated mix, shared by degrees of their own or by all GPUs alike.

The short rows are packed conversations, as SFT has them: their lengths are those of a real set, InstructLab's
(Apache-2.0, 24,545 conversations, recipe `sft-offline`), in tokens of Llama-3.1's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ultralong.bench.training.case import RowCount
from ultralong.data.read.documents import Document
from ultralong.planner.machine import Machine
from ultralong.planner.shapes import Shape
from ultralong.training.batches import RowOrder, StepPacks
from ultralong.training.throughput import query_key_pairs, step_flops

# Tokens of conversations, at the middle of 32 equal parts of the set; in the mean 138.
CONVERSATIONS = (
    *(37, 45, 51, 56, 60, 65, 70, 75, 80, 84, 89, 93, 98, 104, 109, 114),
    *(120, 126, 131, 137, 144, 151, 159, 168, 179, 192, 206, 222, 243, 271, 316, 422),
)
SEEDS = 200_000  # that are tried
UNLIKELY = 1e-3  # expected finds among them, below which none is looked for
SHORT = 8192  # rows of up to so many tokens hold conversations that see no other, longer ones are one text


def conversations(tokens: int, seed: int = 0) -> list[Document]:
    """Documents of random letters, a token each, of conversations' lengths, for `tokens` tokens or a little more."""
    found: list[Document] = []
    rng, left = np.random.default_rng(seed), tokens
    while left > 0:
        size = int(rng.choice(CONVERSATIONS))
        letters = rng.integers(ord("a"), ord("z") + 1, size=size, dtype=np.uint8).tobytes().decode("ascii")
        found.append(Document(f"conversation-{len(found)}", letters, "synthetic", "CC0-1.0"))
        left -= size
    return found


class OneRowPasses(RowOrder):
    """Each row in a pass of its own, shared by all processes of a group: a fixed degree of context parallelism."""

    def packs(self, first: int, count: int, groups: int, most: int, token_work: float) -> StepPacks:
        """As `RowOrder.packs`, one row after another; each group reads as many, as the trainer gives them out."""
        found = super().packs(first, count, 1, most, token_work)
        each = count // groups
        passes = tuple(
            tuple((self.place(first + group * each + number),) for group in range(groups)) for number in range(each)
        )
        return StepPacks(passes, found.tokens, found.pairs)


def seed_of(mix: Sequence[RowCount], steps: int) -> int:
    """The first seed with which each step of a run draws just the rows of a mix, by the trainer's own draw.

    Raises:
        ValueError: None was found soon: there are too many kinds of rows, or steps.
    """
    rows = np.array([part.rows for part in mix])
    for seed in range(SEEDS if SEEDS * _chance(rows.tolist(), steps) > UNLIKELY else 0):
        drawn = np.random.default_rng(seed).choice(len(mix), size=(steps, rows.sum()), p=rows / rows.sum())
        if all((drawn == number).sum(axis=1).tolist() == [count] * steps for number, count in enumerate(rows)):
            return seed
    raise ValueError(f"no order of rows has this mix in each of {steps} steps: take fewer steps or kinds of rows.")


def _chance(rows: Sequence[int], steps: int) -> float:
    """The probability that each step of a run draws just so many rows of each kind."""
    total = sum(rows)
    orders = math.factorial(total) // math.prod(map(math.factorial, rows))
    return float(orders * math.prod((count / total) ** count for count in rows)) ** steps


def useful_flops(shape: Shape, tokens: float, pairs: float) -> float:
    """Causal FLOP of a step, recomputation not counted, by the rule of the log."""
    return step_flops(shape.multiplied, shape.layers, shape.heads * shape.head_dim, tokens, pairs)


def kernel_seconds(shape: Shape, machine: Machine, kernel: str, mix: Sequence[RowCount], gpus: int) -> float:
    """Seconds of a step that only runs attention and matrix products, at the machine's rates, in equal shares.

    Attention runs at the kernel's rate for each row's length and at no less for short conversations than for rows of
    `SHORT`; nothing is recomputed, exchanged or waited for.
    """
    size, total = shape.heads * shape.head_dim, 0.0
    for part in mix:
        forward, backward = machine.attention_rates(kernel, shape.head_dim, part.tokens)
        pairs = part.rows * _pairs(part.tokens)
        total += shape.layers * size * pairs * (4 / forward + 10 / backward)
        total += 6.0 * shape.multiplied * part.rows * part.tokens / machine.matmul_rate(shape.hidden)
    return total / gpus


def _pairs(tokens: int) -> float:
    """Query-key pairs of a row of the mix."""
    if tokens > SHORT:
        return query_key_pairs(tokens, None)
    square = sum(n * n for n in CONVERSATIONS) / sum(CONVERSATIONS)  # of a token's conversation, in the mean
    return tokens * square / 2
