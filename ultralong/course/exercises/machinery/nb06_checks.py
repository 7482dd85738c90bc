"""What the exercises of 06_sequence_parallel compute: right answers, wrong ones, and the checks.

Shapes: T tokens of a row, P ranks, H heads, D head size; one row. Tensors are float64 unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ultralong.attention import make_attention_context
from ultralong.attention.layout import zigzag as zigzag_layout
from ultralong.course.checks import NotTried
from ultralong.course.exchanges import recorded
from ultralong.utils.local_ranks import RankFailed, run_ranks
from ultralong.utils.processes import start_method

Piece = tuple[int, int]
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


# ---- 06.zigzag


def zigzag(rank: int, ranks: int) -> tuple[int, int]:
    """The two of 2P equal chunks that a rank holds."""
    return rank, 2 * ranks - 1 - rank


def check_zigzag(answer: Any) -> str:
    """Every chunk is held once, and all ranks have the same work."""
    for ranks in (2, 4):
        held = [tuple(answer(rank, ranks)) for rank in range(ranks)]
        chunks = sorted(chunk for own in held for chunk in own)
        assert chunks == list(range(2 * ranks)), (
            f"With {ranks} ranks the chunks held are {chunks}; every one of 0..{2 * ranks - 1} belongs to one rank."
        )
        work = [sum(2 * chunk + 1 for chunk in own) for own in held]
        assert len(set(work)) == 1, (
            f"Chunks {held} cost {work} (in half chunks squared): rank {work.index(max(work))} works longest and all "
            "others wait for it. Later chunks see more: give a rank an early one and a late one that even out."
        )
        right = [zigzag_layout(64, ranks).ranges(rank) for rank in range(ranks)]
        size = 64 // (2 * ranks)
        mine = [tuple(sorted((chunk * size, (chunk + 1) * size) for chunk in own)) for own in held]
        joined = [((pieces[0][0], pieces[1][1]),) if pieces[0][1] == pieces[1][0] else pieces for pieces in mine]
        assert joined == right, "Equal work, but other chunks than the library's: rank 0 holds the first and the last."
    return "every rank has the same work: one early chunk and one late one."


# ---- 06.rectangles


def sees(mine: list[Piece], theirs: list[Piece]) -> set[tuple[int, int]]:
    """Which of my pieces sees which of theirs: pairs (index of mine, index of theirs), causal, no overlap."""
    return {(i, j) for i, (start, _) in enumerate(mine) for j, (first, _) in enumerate(theirs) if first < start}


def check_sees(answer: Any) -> str:
    """Which ranks' pieces see which, for all pairs of ranks."""
    pieces = [list(zigzag_layout(64, 4).ranges(rank)) for rank in range(4)]
    for one in range(4):
        for other in range(4):
            if one == other or len(pieces[one]) + len(pieces[other]) != 4:
                continue
            right, found = sees(pieces[one], pieces[other]), answer(list(pieces[one]), list(pieces[other]))
            found = {tuple(pair) for pair in found}
            what = f"Queries {pieces[one]} and keys {pieces[other]}"
            assert found != {(j, i) for i, j in right} or found == right, (
                f"{what}: pairs are (piece of the queries, piece of the keys); yours are the other way round."
            )
            assert not found - right, (
                f"{what}: piece {min(found - right)} lies in the future, where a causal query sees nothing. "
                "Computing it and masking it costs as much as a useful one."
            )
            assert found == right, (
                f"{what}: {min(right - found)} is missing. A later piece of queries sees every earlier key."
            )
    return "two of four rectangles at every hop, all of them full: the ring needs no mask between ranks."


# ---- 06.all_to_all


def tokens_to_heads(x: Tensor, rank: int, world: int) -> Tensor:
    """All-to-all: this rank's tokens with all heads, (T/P, H, D), to all tokens with H/P heads, (T, H/P, D)."""
    share, heads, size = x.shape
    sent = x.reshape(share, world, heads // world, size).transpose(0, 1).contiguous()  # (P, T/P, H/P, D)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.reshape(world * share, heads // world, size)


def strided_heads(x: Tensor, rank: int, world: int) -> Tensor:
    """Mistake: each rank gets every n-th head instead of neighbouring ones."""
    order = torch.arange(x.shape[1]).reshape(-1, world).T.flatten()
    return tokens_to_heads(x[:, order], rank, world)


def interleaved_tokens(x: Tensor, rank: int, world: int) -> Tensor:
    """Mistake: tokens of the ranks alternate in the result."""
    found = tokens_to_heads(x, rank, world)
    return found.reshape(world, -1, *found.shape[1:]).transpose(0, 1).reshape(found.shape)


def own_heads_only(x: Tensor, rank: int, world: int) -> Tensor:
    """Mistake: nothing is exchanged, a rank repeats its own tokens."""
    heads = x.shape[1] // world
    return x[:, rank * heads : (rank + 1) * heads].repeat(world, 1, 1)


def not_contiguous(x: Tensor, rank: int, world: int) -> Tensor:
    """Mistake: the tensor is cut without bringing the ranks' heads to the front."""
    sent = x.reshape(world, -1, x.shape[1] // world, x.shape[2])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous())
    return received.reshape(world * x.shape[0], x.shape[1] // world, x.shape[2])


def check_all_to_all(answer: Any) -> str:
    """The exchange in groups of two and four processes, element by element."""
    tokens, heads, size = 8, 8, 2
    row = torch.arange(tokens * heads * size, dtype=torch.float64).reshape(tokens, heads, size)
    for world in (2, 4):
        share, part = tokens // world, heads // world
        results = in_ranks(answer, world, [(row[r * share : (r + 1) * share].clone(),) for r in range(world)])
        for rank, found in enumerate(results):
            right = row[:, rank * part : (rank + 1) * part]
            where = f"Rank {rank} of {world}"
            assert found.shape == right.shape, (
                f"{where} ends with {tuple(right.shape)}, yours has {tuple(found.shape)}."
            )
            mine = slice(rank * share, (rank + 1) * share)
            assert not (torch.equal(found[:share], right[mine]) and torch.equal(found[-share:], right[mine])), (
                f"{where} holds its own tokens only, repeated: nothing came from the others."
            )
            assert not torch.equal(found.sort(0).values, right.sort(0).values) or torch.equal(found, right), (
                f"{where} has the right heads with their tokens out of order: what came from rank p are tokens p "
                f"T/P to "
                "(p + 1) T/P, one after another."
            )
            strided = row[:, rank::world]
            assert not torch.equal(found, strided), (
                f"{where} got heads {list(range(rank, heads, world))}. With grouped queries neighbours share a kv "
                f"head: "
                f"a rank gets neighbouring heads, {list(range(rank * part, (rank + 1) * part))} here."
            )
            assert torch.equal(found, right), (
                f"{where}: a mixture of tokens and heads. all_to_all_single sends x[p] to rank p: the heads' "
                f"dimension has "
                "to come first, (P, T/P, H/P, D), and contiguous."
            )
    return "all tokens of a part of the heads, on 2 and on 4 real processes."


# ---- 06.deal


def deal(lengths: list[int], ranks: int) -> list[int]:
    """The rank of each document, so that the work, the sum of n^2, is even: the heaviest first, to the least loaded."""
    load, owner = [0] * ranks, [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        owner[index] = load.index(min(load))
        load[owner[index]] += lengths[index] ** 2
    return owner


def deal_by_tokens(lengths: list[int], ranks: int) -> list[int]:
    """Mistake: documents are balanced by tokens, not by the squares that attention costs."""
    load, owner = [0] * ranks, [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        owner[index] = load.index(min(load))
        load[owner[index]] += lengths[index]
    return owner


def check_deal(answer: Any) -> str:
    """The busiest rank's attention work is less than a tenth above the mean."""
    lengths, ranks = [40, 38, 25, 24, 20, 18, 12, 11, 10, 9, 8, 8, 7, 6, 5, 4, 3, 2], 3
    owner = list(answer(list(lengths), ranks))
    assert len(owner) == len(lengths), f"One rank for each of {len(lengths)} documents; yours gives {len(owner)}."
    assert all(rank in range(ranks) for rank in owner), f"Ranks are 0 to {ranks - 1}, yours are {sorted(set(owner))}."
    work = [sum(n * n for n, rank in zip(lengths, owner, strict=True) if rank == each) for each in range(ranks)]
    tokens = [sum(n for n, rank in zip(lengths, owner, strict=True) if rank == each) for each in range(ranks)]
    worst = max(work) * ranks / sum(work)
    assert worst < 1.1 or max(tokens) * ranks / sum(tokens) > 1.1, (
        f"Tokens are even, {tokens}, work is not, {work}: a document costs the square of its length. The busiest rank "
        f"works {worst:.2f} times the mean."
    )
    assert worst < 1.1, (
        f"Work is {work}: the busiest rank has {worst:.2f} times the mean, and all others wait. Deal the heaviest "
        "document first, always to the rank with the least work so far."
    )
    return f"work {work}: the busiest rank has {worst:.3f} times the mean, and nothing is sent."


# ---- 06.levels

HOSTS, EACH = 2, 2  # hosts, and ranks of each
ROW, ROOM, HEADS, KV_HEADS, SIZE = 64, 16, 6, 2, 16  # tokens, tokens that a rank has room for, heads and their size
MOST_ACROSS = 5000  # bytes that a rank may send to the other host in a forward pass


def levels_cost(mesh: tuple[int, ...], scheme: str) -> tuple[list[int], list[int], float]:
    """What each of four real ranks sends inside its host and to the other one, in bytes, and the output's error.

    Raises:
        ValueError: The library refuses the scheme on this mesh.
    """
    found = run_ranks(_levels, HOSTS * EACH, mesh, scheme, timeout=60 if start_method() == "fork" else 240)
    if refused := [each for each in found if isinstance(each, str)]:
        raise ValueError(refused[0])
    inside, across, errors = zip(*found, strict=True)
    return list(inside), list(across), max(errors)


def _levels(rank: int, world: int, mesh: tuple[int, ...], scheme: str) -> tuple[int, int, float] | str:
    group = init_device_mesh("cpu", mesh)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, ROW, HEADS, SIZE, generator=generator)
    k, v = torch.randn(2, 1, ROW, KV_HEADS, SIZE, generator=generator)
    try:
        context = make_attention_context(ROW, group, scheme, heads=HEADS, kv_heads=KV_HEADS)
    except ValueError as error:
        return str(error)
    with recorded() as sent:
        part = context.attend(*(context.shard(x) for x in (q, k, v)))
    out = context.unshard(part)
    alone = make_attention_context(ROW, heads=HEADS, kv_heads=KV_HEADS).attend(q, k, v)
    across = sum(each.bytes for each in sent if each.target // EACH != rank // EACH)
    return sum(each.bytes for each in sent) - across, across, float((out - alone).abs().max())


def check_levels(answer: Any) -> str:
    """The library runs the scheme on four real ranks; what crosses between the hosts is counted."""
    keys = set(answer) if isinstance(answer, dict) else set()
    assert keys == {"mesh", "scheme"}, f"Give a dict with the keys mesh and scheme; found {sorted(keys) or answer!r}."
    mesh = tuple(answer["mesh"]) if isinstance(answer["mesh"], tuple | list) else (answer["mesh"],)
    assert len(mesh) in (1, 2) and all(type(n) is int and n > 0 for n in mesh), (
        f"mesh is (ranks,) for one level, or (hosts, ranks of a host) for two; found {answer['mesh']!r}."
    )
    ranks = math.prod(mesh)
    assert ranks >= ROW // ROOM, (
        f"{ranks} ranks for a row leave {ROW // ranks} tokens on each, and there is room for {ROOM}. More ranks have "
        "to share it."
    )
    assert ranks == HOSTS * EACH, f"A mesh of {mesh} has {ranks} ranks; there are {HOSTS * EACH}."
    try:
        inside, across, error = levels_cost(mesh, answer["scheme"])
    except ValueError as refused:
        raise AssertionError(f"The library refuses it: {refused}.") from refused
    assert error < 1e-5, f"The output is off by {error:.0e} from one process."
    busiest = across.index(max(across))
    sent = f"to the other host ranks send {', '.join(f'{each:,}' for each in across)} bytes"
    why = (
        f"In one ring rank {busiest} hands every rank's keys on to the other host, and others hand none."
        if 0 in across
        else "Keys of both kv heads go to each rank of the other host that sees them."
    )
    assert max(across) <= MOST_ACROSS, (
        f"{sent}; at most {MOST_ACROSS:,} are wanted. {why} Exchange inside a host first."
    )
    return f"{sent}, and inside their host {', '.join(f'{each:,}' for each in inside)}; the output is one process's."


def in_ranks(answer: Any, world: int, given: list[Any]) -> list[Any]:
    """Call an answer as `answer(*given[rank], rank, world)` in real processes; its unfinished state comes through."""
    try:
        # Spawned ranks, as on a machine with GPUs, import everything before they begin.
        results = run_ranks(_work, world, answer, given, timeout=60 if start_method() == "fork" else 240)
    except RankFailed as error:
        last = str(error).strip().splitlines()[-1]
        raise AssertionError(f"A rank failed: {last}. All ranks have to make the same exchanges.") from error
    if any(result is None for result in results):
        raise NotTried
    return results


def _work(rank: int, world: int, answer: Any, given: list[Any]) -> Any:
    try:
        return answer(*given[rank], rank, world)
    except NotTried:
        return None
