"""Exercises of 06_sequence_parallel, and the ring of its last one: the right one, wrong ones, and the check.

Shapes of the ring: T tokens of a row of which each of two ranks holds half, D head size; one head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.machinery.nb05_checks import merge, plain
from ultralong.course.exercises.machinery.nb06_checks import (
    check_all_to_all,
    check_deal,
    check_levels,
    check_sees,
    check_zigzag,
    deal,
    deal_by_tokens,
    in_ranks,
    interleaved_tokens,
    not_contiguous,
    own_heads_only,
    sees,
    strided_heads,
    tokens_to_heads,
    zigzag,
)

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, offset: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block of keys from the pair of the whole row; see 05.backward."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.T * scale
    if offset is not None:
        seen = torch.arange(len(k))[None] <= torch.arange(len(q))[:, None] + offset
        scores = scores.masked_fill(~seen, -math.inf)
    probabilities = (scores - lse[:, None]).exp()
    grad = probabilities * (dout @ v.T - (dout * out).sum(-1, keepdim=True))
    return grad @ k * scale, grad.T @ q * scale, probabilities.T @ dout


def ring(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    """A ring of two ranks that hold the row's halves, each (T/2, D): (out, dq, dk, dv) of this rank's tokens."""
    peer, block = 1 - rank, torch.stack((k, v))
    other = torch.empty_like(block)
    for each in dist.batch_isend_irecv([dist.P2POp(dist.isend, block, peer), dist.P2POp(dist.irecv, other, peer)]):
        each.wait()
    out, lse = plain(q, k, v, offset=0)
    if rank == 1:  # only the later half sees the other one
        out, lse = merge(out, lse, *plain(q, other[0], other[1]))
    dq, dk, dv = backward(q, k, v, out, lse, dout, 0)
    share = torch.zeros_like(block)
    if rank == 1:
        more, share[0], share[1] = backward(q, other[0], other[1], out, lse, dout, None)
        dq = dq + more
    back = torch.empty_like(block)
    for each in dist.batch_isend_irecv([dist.P2POp(dist.isend, share, peer), dist.P2POp(dist.irecv, back, peer)]):
        each.wait()
    return out, dq, dk + back[0], dv + back[1]


def ring_sees_future(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    """Wrong: the early rank sees the late half too."""
    other = _swap(torch.stack((k, v)), rank)
    out, lse = merge(*plain(q, k, v, offset=0), *plain(q, other[0], other[1]))
    return (out, *backward(q, k, v, out, lse, dout, 0))


def ring_keeps_shares(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    """Wrong: each rank keeps its share of the keys' gradients instead of sending them home."""
    other = _swap(torch.stack((k, v)), rank)
    out, lse = plain(q, k, v, offset=0)
    if rank:
        out, lse = merge(out, lse, *plain(q, other[0], other[1]))
    dq, dk, dv = backward(q, k, v, out, lse, dout, 0)
    return out, dq + (backward(q, other[0], other[1], out, lse, dout, None)[0] if rank else 0), dk, dv


def ring_stays_home(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    """Wrong: nothing is exchanged."""
    out, lse = plain(q, k, v, offset=0)
    return (out, *backward(q, k, v, out, lse, dout, 0))


def ring_blocks_lse(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    """Wrong: the backward pass uses the block's own log-sum-exp."""
    _, right_dq, right_dk, right_dv = ring(q, k, v, dout, rank)
    out, lse = plain(q, k, v, offset=0)
    dq, _, _ = backward(q, k, v, out, lse, dout, 0)
    return ring(q, k, v, dout, rank)[0], dq if rank else right_dq, right_dk, right_dv


def check_ring(answer: Any) -> str:
    """Compare output and gradients with those of one process."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(4, 12, 4, generator=generator, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = (leaves[0] @ leaves[1].T / 2).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
    out = scores.softmax(-1) @ leaves[2]
    out.backward(dout)
    right = [out.detach(), *(x.grad for x in leaves)]
    halves = [[x[r * 6 : (r + 1) * 6].clone() for x in (q, k, v, dout)] for r in range(2)]
    results = in_ranks(_ring_only(answer), 2, halves)
    parts = [[x[rank * 6 : (rank + 1) * 6] for x in right if x is not None] for rank in range(2)]
    for rank, found in reversed(list(enumerate(results))):  # rank 1 sees both halves
        assert len(found) == 4, "Give (out, dq, dk, dv) of the rank's own tokens."
        own_q, own_k, own_v, own_dout = halves[rank]
        alone = ring_stays_home(own_q, own_k, own_v, own_dout, rank)[0]
        assert rank == 0 or not torch.allclose(found[0], alone), (
            "Rank 1's queries see rank 0's keys as well: those have to come, and the two results to be merged."
        )
        assert torch.allclose(found[0], parts[rank][0]), (
            f"Rank {rank}'s output is off by {float((found[0] - parts[rank][0]).abs().max()):.2g}. Rank 0 sees nothing "
            "of rank 1: its keys lie in the future."
        )
    for rank, found in enumerate(results):
        assert torch.allclose(found[1], parts[rank][1]), (
            f"Rank {rank}'s dq is off: it is the sum over both blocks of keys, each with the merged lse and output."
        )
        assert torch.allclose(found[2], parts[rank][2]) and torch.allclose(found[3], parts[rank][3]), (
            f"Rank {rank}'s dk or dv is off: what the other rank's queries add to them has to travel back."
        )
    return "output and all three gradients equal one process's, over two real ones."


def _swap(block: Tensor, rank: int) -> Tensor:
    other = torch.empty_like(block)
    pair = [dist.P2POp(dist.isend, block, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for each in dist.batch_isend_irecv(pair):
        each.wait()
    return other


def _ring_only(answer: Any) -> Any:
    return lambda q, k, v, dout, rank, world: answer(q, k, v, dout, rank)


EXERCISES = (
    Exercise(
        name="06.zigzag",
        title="Who holds which chunks",
        task="Write `zigzag(rank, ranks)`: the row is cut into 2P equal chunks; which two does a rank hold?",
        check=check_zigzag,
        solution=zigzag,
        mistakes=(
            Mistake("contiguous", lambda r, p: (2 * r, 2 * r + 1), "an early one and a late one"),
            Mistake("off by one", lambda r, p: (r, 2 * p - r), "belongs to one rank"),
            Mistake("reversed ranks", lambda r, p: (p - 1 - r, p + r), "other chunks than the library's"),
        ),
        hints=("Chunk c sees c chunks before it and half of itself.", "Rank 0 holds the first chunk and the last."),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="06.rectangles",
        title="What a rank's queries see of another's keys",
        task=(
            "Write `sees(mine, theirs)`: lists of pieces (start, stop) of the row, none of mine overlaps one of "
            "theirs. "
            "Give the set of (index of mine, index of theirs) for which queries see keys, under causal attention."
        ),
        check=check_sees,
        solution=sees,
        mistakes=(
            Mistake("all", lambda a, b: {(i, j) for i in range(len(a)) for j in range(len(b))}, "in the future"),
            Mistake("transposed", lambda a, b: {(j, i) for i, j in sees(a, b)}, "the other way round"),
            Mistake("by index", lambda a, b: {(1, 0)}, "is missing"),
        ),
        hints=("Compare the starts of two pieces.", "A piece of keys is seen whole or not at all."),
        minutes=5,
    ),
    Exercise(
        name="06.all_to_all",
        title="Swap tokens for heads",
        task=(
            "Write `tokens_to_heads(x, rank, world)`: x holds this rank's tokens with all heads, (T/P, H, D); give all "
            "tokens with this rank's H/P heads, (T, H/P, D). Use `dist.all_to_all_single`; the check runs real "
            "processes."
        ),
        check=check_all_to_all,
        solution=tokens_to_heads,
        mistakes=(
            Mistake("strided heads", strided_heads, "grouped queries"),
            Mistake("interleaved tokens", interleaved_tokens, "out of order"),
            Mistake("no exchange", own_heads_only, "nothing came from the others"),
            Mistake("heads not in front", not_contiguous, "has to come first"),
        ),
        hints=(
            "all_to_all_single(received, sent) sends sent[p] to rank p.",
            "Split the heads in P parts and bring that dimension to the front; make it contiguous.",
            "received[p] are rank p's tokens: join them in rank order.",
        ),
        minutes=12,
    ),
    Exercise(
        name="06.deal",
        title="Deal whole documents to ranks",
        task=(
            "Write `deal(lengths, ranks)`: the rank of each document. A document costs the square of its length; the "
            "busiest rank may have at most 1.1 times the mean."
        ),
        check=check_deal,
        solution=deal,
        mistakes=(
            Mistake("by tokens", deal_by_tokens, "a document costs the square"),
            Mistake("in turn", lambda n, p: [i % p for i in range(len(n))], "heaviest document first"),
            Mistake("too few", lambda n, p: [0, 1, 2], "One rank for each"),
            Mistake("ranks from 1", lambda n, p: [1 + r for r in deal(n, p)], "Ranks are 0 to"),
        ),
        hints=(
            "Sort by length, the longest first.",
            "Give each to the rank with the least work so far, counted in n^2.",
        ),
        minutes=8,
    ),
    Exercise(
        name="06.ring",
        title="A ring of two in 25 lines",
        task=(
            "Write `ring(q, k, v, dout, rank)`: each of two ranks holds half of a row, (T/2, D), in order. Give "
            "(out, dq, "
            "dk, dv) of this rank's tokens under causal attention. `plain`, `merge` and `backward` of one block are "
            "given (`from ultralong.course.exercises.machinery.nb06 import ...`); exchange by "
            "`dist.batch_isend_irecv`."
        ),
        check=check_ring,
        solution=ring,
        mistakes=(
            Mistake("sees the future", ring_sees_future, "its keys lie in the future"),
            Mistake("shares stay", ring_keeps_shares, "has to travel back"),
            Mistake("no exchange", ring_stays_home, "have to come"),
            Mistake("dq of one block", ring_blocks_lse, "sum over both blocks"),
        ),
        hints=(
            "Both ranks send their keys and values and receive the other's, also where nobody looks at them.",
            "Rank 0 sees its own half only; rank 1 merges its own result with that over the other half.",
            "Backward: rank 1 computes what its queries add to rank 0's dk and dv, and sends it back.",
        ),
        difficulty="hard",
        minutes=25,
    ),
    Exercise(
        name="06.levels",
        title="A scheme for two hosts",
        task=(
            "Two hosts of two GPUs share a row of 64 tokens, and each GPU has room for 16. The model has 6 query heads "
            "and 2 kv heads, and the link between the hosts is slow. Give the dict "
            '{"mesh": ..., "scheme": ...}: the mesh is (ranks,) for one level or (hosts, ranks of a host) for two, the '
            "scheme is a name of `ultralong.attention.SCHEMES`. No rank may send more than 5,000 bytes to the other "
            "host in a forward pass. The check runs it on four real processes, where ranks 0 and 1 are the first host."
        ),
        check=check_levels,
        solution={"mesh": (2, 2), "scheme": "hybrid-ring"},
        mistakes=(
            Mistake("Ulysses over all", {"mesh": (4,), "scheme": "ulysses"}, "can't split 6 query"),
            Mistake("one ring", {"mesh": (4,), "scheme": "ring"}, "In one ring rank 3"),
            Mistake("gathered over all", {"mesh": (4,), "scheme": "gathered"}, "Keys of both kv heads"),
            Mistake("one host", {"mesh": (2,), "scheme": "ulysses"}, "More ranks have to share"),
            Mistake("two levels, one scheme", {"mesh": (2, 2), "scheme": "ring"}, "takes one level of ranks"),
            Mistake("by name only", {"mesh": (4,), "scheme": "hybrid-ring"}, "takes two levels of ranks"),
        ),
        hints=(
            "Over how many ranks do 6 query heads and 2 kv heads split? Not over four.",
            "Two ranks of one host can swap tokens for heads first. Then a rank has keys of one kv head only.",
            "A mesh of two levels is (hosts, ranks of a host); its schemes are the two hybrids.",
        ),
        minutes=8,
    ),
)
