"""Recorded traffic against the formulas: what Ulysses, gathered keys and the ring send for a whole row."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ultralong import attention
from ultralong.course.exchanges import recorded
from ultralong.utils.local_ranks import run_ranks

TOKENS, HEADS, KV_HEADS, SIZE = 64, 8, 4, 8


def traffic(rank: int, world: int, scheme: str) -> list:
    context = attention.make_attention_context(TOKENS, dist.group.WORLD, scheme, heads=HEADS, kv_heads=KV_HEADS)
    share = TOKENS // world
    q = torch.randn(1, share, HEADS, SIZE)
    k, v = (torch.randn(1, share, KV_HEADS, SIZE) for _ in range(2))
    with recorded() as found:
        context.attend(q, k, v)
    before = len(found)
    context.attend(q, k, v)
    assert len(found) == before, "recording goes on after its block"
    return [(each.kind, each.source, each.target, each.bytes) for each in found]


@pytest.mark.parametrize("world", [2, 4])
def test_ulysses_sends_each_head_chunk_of_a_rank_once(world):
    share, kinds = TOKENS // world, set()
    for rank, found in enumerate(run_ranks(traffic, world, "ulysses")):
        kinds |= {kind for kind, *_ in found}
        # Queries and outputs of all heads, keys and values of all kv heads; 1/P stays at home.
        elements = share * SIZE * (2 * HEADS + 2 * KV_HEADS) * (world - 1) / world
        assert sum(size for *_, size in found) == 4 * elements
        assert {source for _, source, *_ in found} == {rank}
        assert {target for _, _, target, _ in found} == set(range(world)) - {rank}
    assert kinds


@pytest.mark.parametrize("world", [2, 4])
def test_a_ring_passes_keys_and_values_to_the_next_rank(world):
    share = TOKENS // world
    for rank, found in enumerate(run_ranks(traffic, world, "ring")):
        assert {target for _, _, target, _ in found} == {(rank + 1) % world}
        # Zigzag: rank 0's second block is the row's last one, which no other rank's queries see. It is never sent, so
        # all ranks but the last, which would not pass it on, send half a share less.
        halves = 2 * (world - 1) - (rank < world - 1)
        assert sum(size for *_, size in found) == 4 * halves * share // 2 * SIZE * 2 * KV_HEADS


@pytest.mark.parametrize("world", [2, 4])
def test_gathered_keys_go_to_the_ranks_whose_queries_see_them(world):
    share = TOKENS // world
    for rank, found in enumerate(run_ranks(traffic, world, "gathered")):
        assert {target for _, _, target, _ in found} == set(range(world)) - {rank}
        # Zigzag: a rank's first block is seen by all others, its second one by the ranks before it.
        halves = (world - 1) + rank
        assert sum(size for *_, size in found) == 4 * halves * share // 2 * SIZE * 2 * KV_HEADS
