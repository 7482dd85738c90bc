"""The ring of 06_sequence_parallel's last exercise: the right one, wrong ones, and the check.

Shapes: T tokens of a row of which each of two ranks holds half, D head size; one head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.course.exercises.nb05_checks import merge, plain
from ultralong.course.exercises.nb06_checks import in_ranks

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
    other = _swap(torch.stack((k, v)), rank)
    out, lse = merge(*plain(q, k, v, offset=0), *plain(q, other[0], other[1]))
    return (out, *backward(q, k, v, out, lse, dout, 0))


def ring_keeps_shares(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    other = _swap(torch.stack((k, v)), rank)
    out, lse = plain(q, k, v, offset=0)
    if rank:
        out, lse = merge(out, lse, *plain(q, other[0], other[1]))
    dq, dk, dv = backward(q, k, v, out, lse, dout, 0)
    return out, dq + (backward(q, other[0], other[1], out, lse, dout, None)[0] if rank else 0), dk, dv


def ring_stays_home(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    out, lse = plain(q, k, v, offset=0)
    return (out, *backward(q, k, v, out, lse, dout, 0))


def ring_blocks_lse(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rank: int) -> Parts:
    _, right_dq, right_dk, right_dv = ring(q, k, v, dout, rank)
    out, lse = plain(q, k, v, offset=0)
    dq, _, _ = backward(q, k, v, out, lse, dout, 0)
    return ring(q, k, v, dout, rank)[0], dq if rank else right_dq, right_dk, right_dv


def check_ring(answer: Any) -> str:
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
