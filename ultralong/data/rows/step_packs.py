"""Packs of one optimizer step: rows of different lengths laid end to end so that the groups' work balances.

A pack is what one group of processes reads in one forward and backward pass. Groups that shard parameters wait for each
other in every layer, so all of them make the same number of passes, and those that run side by side should take as
long. The same idea is called global-batch packing in NeMo, and is part of dynamic context parallelism in Megatron-LM
and of FlexSP (arXiv 2412.01523).
"""

from __future__ import annotations

from collections.abc import Sequence


def step_packs(lengths: Sequence[int], work: Sequence[float], groups: int, most: int) -> list[list[list[int]]]:
    """Which rows each group reads in which pass: a pure function, so that every process finds the same.

    Longest processing time first (Graham 1969): the heaviest row that is left goes to the pack with the least work so
    far that has room for it. Packs of about the same work are then read side by side.

    Args:
        lengths: Tokens of each row of the step.
        work: What each row costs, in any unit.
        groups: Groups that read side by side.
        most: Most tokens of a pack.

    Returns:
        For every pass and group the rows by number, rising; a group without a row in a pass has an empty list. There
        are as few passes as the tokens allow.

    Raises:
        ValueError: A row has more than `most` tokens.
    """
    if max(lengths) > most:
        raise ValueError(f"a pack holds at most {most:,} tokens, found a row of {max(lengths):,}.")
    passes = max(1, -(-sum(lengths) // (groups * most)))
    while (packs := _assigned(lengths, work, groups * passes, most)) is None:
        passes += 1
    packs.sort(key=lambda pack: (-sum(work[row] for row in pack), pack))
    return [packs[first : first + groups] for first in range(0, len(packs), groups)]


def _assigned(lengths: Sequence[int], work: Sequence[float], count: int, most: int) -> list[list[int]] | None:
    """Rows in `count` packs; None where one finds no room. One pack for each row is always enough."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads, free = [0.0] * count, [most] * count
    for row in sorted(range(len(lengths)), key=lambda row: (-work[row], row)):
        with_room = [pack for pack in range(count) if free[pack] >= lengths[row]]
        if not with_room:
            return None
        pack = min(with_room, key=lambda pack: (loads[pack], pack))
        packs[pack].append(row)
        loads[pack] += work[row]
        free[pack] -= lengths[row]
    return [sorted(pack) for pack in packs]
