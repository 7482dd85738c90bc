"""What the exercises of 05_attention_kernels compute: right answers, wrong ones, and the checks.

Shapes: Q queries, K keys, D head size; one head, no batch. A partial result is the pair (out, (Q, D); lse, (Q,)).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _row(queries: int, keys: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, 8, generator=generator, dtype=torch.float64) * scale
    k, v = torch.randn(2, keys, 8, generator=generator, dtype=torch.float64)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, offset: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention written out: (out, lse). With an offset, query i sees the keys up to i + offset."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if offset is not None:
        seen = torch.arange(len(k))[None] <= torch.arange(len(q))[:, None] + offset
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.nan_to_num((scores - lse[:, None]).exp()) @ v, lse


# ---- 05.merge


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over different keys as one."""
    joined = torch.logaddexp(lse, other_lse)
    finite = torch.where(joined.isinf(), torch.zeros_like(joined), joined)
    return (lse - finite).exp()[:, None] * out + (other_lse - finite).exp()[:, None] * other, joined


def merge_exp_of_lse(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mistake: the exponential of a log-sum-exp overflows."""
    a, b = lse.exp(), other_lse.exp()
    return (a[:, None] * out + b[:, None] * other) / (a + b)[:, None], (a + b).log()


def merge_forgets_infinite(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mistake: two parts without a key give minus infinity less minus infinity."""
    joined = torch.logaddexp(lse, other_lse)
    return (lse - joined).exp()[:, None] * out + (other_lse - joined).exp()[:, None] * other, joined


def merge_average(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mistake: both parts weigh the same."""
    return (out + other) / 2, torch.logaddexp(lse, other_lse)


def merge_bf16(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mistake: parts are merged in bfloat16."""
    parts = merge(*(x.bfloat16() for x in (out, lse, other, other_lse)))
    return parts[0].double(), parts[1].double()


def check_merge(answer: Any) -> str:
    """Parts of a row merged against the whole row, empty and huge ones too."""
    q, k, v = _row(5, 12)
    right = plain(q, k, v)
    out, lse = answer(*plain(q, k[:5], v[:5]), *plain(q, k[5:], v[5:]))
    error = float((out - right[0]).abs().max())
    assert error < 0.1, (
        f"The merged output is off by {error:.2f}. Each part weighs by its share of the softmax's sum, "
        "exp(lse - joint lse); a plain mean would only be right for equal sums."
    )
    assert error < 1e-9, (
        f"Off by {error:.0e}, a rounding: the pair has to be joined in float32 or wider, for the joins of a ring "
        f"add up."
    )
    assert torch.allclose(lse, right[1]), "The output is right, the joint lse is not: log(exp(lse) + exp(other lse))."
    big = _row(3, 6, scale=2000.0)
    out, _ = answer(*plain(big[0], big[1][:3], big[2][:3]), *plain(big[0], big[1][3:], big[2][3:]))
    assert torch.isfinite(out).all(), (
        "With scores in the thousands exp(lse) overflows, to inf / inf. Take exp only of differences to the "
        "larger one: "
        "torch.logaddexp does."
    )
    none = (torch.zeros(5, 8, dtype=torch.float64), torch.full((5,), -math.inf, dtype=torch.float64))
    out, lse = answer(*none, *none)
    assert not out.isnan().any(), (
        "Queries that see no key in either part have lse = -inf twice, and -inf - -inf is nan. Their output is "
        "0, their "
        "lse stays -inf."
    )
    return "exact for parts of any size, without overflow, and for queries that see nothing."


# ---- 05.blockwise


def blockwise(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Attention over all keys, a block of them at a time, never more than (Q, block) scores."""
    out, lse = torch.zeros_like(q), torch.full((len(q),), -math.inf, dtype=q.dtype)
    for start in range(0, len(k), block):
        out, lse = merge(out, lse, *plain(q, k[start : start + block], v[start : start + block]))
    return out


def blockwise_sum_of_softmaxes(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Mistake: the mean of each block's own softmax."""
    starts = range(0, len(k), block)
    return torch.stack([plain(q, k[s : s + block], v[s : s + block])[0] for s in starts]).mean(0)


def blockwise_drops_rest(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Mistake: the keys after the last whole block are left out."""
    whole = len(k) // block * block
    return blockwise(q, k[:whole], v[:whole], block)


def blockwise_overflow(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Mistake: no maximum is subtracted before the exponential."""
    top, total = torch.zeros_like(q), torch.zeros(len(q), 1, dtype=q.dtype)
    for start in range(0, len(k), block):
        weights = (q @ k[start : start + block].T / math.sqrt(q.shape[-1])).exp()
        top, total = top + weights @ v[start : start + block], total + weights.sum(-1, keepdim=True)
    return top / total


def check_blockwise(answer: Any) -> str:
    """Blocks of several sizes against the plain softmax, large scores too."""
    q, k, v = _row(4, 11, 1)
    right = plain(q, k, v)[0]
    for block in (11, 4, 1):
        found = answer(q.clone(), k.clone(), v.clone(), block)
        assert isinstance(found, Tensor) and found.shape == q.shape, f"The output is (Q, D) = {tuple(q.shape)}."
        if block == 4:
            lost = plain(q, k[:8], v[:8])[0]
            assert not torch.allclose(found, lost), "11 keys in blocks of 4: the last 3 keys are missing from your sum."
        assert torch.allclose(found, right), (
            f"With blocks of {block} the output is off by {float((found - right).abs().max()):.2g}. A block's softmax "
            "knows its own keys only: join blocks by their log-sum-exp, don't average them."
        )
    big = _row(3, 9, 2, scale=3000.0)
    assert torch.isfinite(answer(*big, 2)).all(), (
        "Scores in the thousands overflow: keep sums relative to the largest score."
    )
    return "the same as over all keys at once, for any block, with (Q, block) scores at a time."


# ---- 05.offset


def causal_offset(queries: int, keys: int) -> int:
    """For queries that are the last ones of a row of `keys`: query i sees keys up to i + offset."""
    return keys - queries


def check_offset(answer: Any) -> str:
    """The number of keys before the first query, for prefill, decoding and a chunk."""
    for queries, keys in ((4, 4), (1, 9), (3, 8)):
        right, found = causal_offset(queries, keys), int(answer(queries, keys))
        assert found != 0 or right == 0, (
            f"Offset 0 with {queries} queries and {keys} keys lets query 0 see key 0 only (top-left). New queries "
            f"stand "
            "at the end of the row: the last one sees every key (bottom-right)."
        )
        assert found != right + 1, (
            f"Query {queries - 1} would see key {queries - 1 + found}, and there are {keys}: off by one."
        )
        assert found != right - 1, f"The last query sees up to key {queries - 1 + found}: its own key is left out."
        assert found == right, f"{queries} queries at the end of {keys} keys: the offset is {right}, yours {found}."
    return "the last query sees every key; with one query (decoding) nothing is masked."


# ---- 05.backward


def backward_scores(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor) -> Tensor:
    """Gradient of the scaled scores of one block of keys, (Q, block), from the saved pair of the whole row."""
    probabilities = (q @ k.T / math.sqrt(q.shape[-1]) - lse[:, None]).exp()
    return probabilities * (dout @ v.T - (dout * out).sum(-1, keepdim=True))


def backward_own_lse(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor) -> Tensor:
    """Mistake: the log-sum-exp of the keys at hand instead of the whole row's."""
    return backward_scores(q, k, v, (q @ k.T / math.sqrt(q.shape[-1])).logsumexp(-1), out, dout)


def backward_no_delta(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor) -> Tensor:
    """Mistake: the row's sum of dout * out is not subtracted."""
    return (q @ k.T / math.sqrt(q.shape[-1]) - lse[:, None]).exp() * (dout @ v.T)


def backward_own_out(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor) -> Tensor:
    """Mistake: the output of the keys at hand instead of the whole row's."""
    return backward_scores(q, k, v, lse, plain(q, k, v)[0], dout)


def check_backward(answer: Any) -> str:
    """The scores' gradients against autograd, over the whole row and over a part of its keys."""
    q, k, v = _row(4, 10, 3)
    out, lse = plain(q, k, v)
    dout = _row(4, 4, 4)[0]
    scores = (q @ k.T / math.sqrt(8)).requires_grad_()
    (scores.softmax(-1) @ v).backward(dout)
    assert scores.grad is not None
    right, block = scores.grad[:, 3:7], slice(3, 7)
    given = (q, k[block], v[block], lse, out, dout)
    found = answer(*(x.clone() for x in given))
    assert isinstance(found, Tensor) and found.shape == right.shape, (
        f"The gradient is (Q, block) = {tuple(right.shape)}."
    )
    assert not torch.allclose(found, backward_own_lse(*given)), (
        "You took the block's own log-sum-exp: its probabilities then sum to 1 over the block. Over the whole row they "
        "do, with the saved lse."
    )
    assert not torch.allclose(found, backward_no_delta(*given)), (
        "The softmax's own part is missing: subtract sum(dout * out) of each query, for a score that grows takes "
        "from all "
        "others."
    )
    assert not torch.allclose(found, backward_own_out(*given)), (
        "sum(dout * out) takes the output over the whole row, which was saved, not the block's."
    )
    assert torch.allclose(found, right), f"Off by {float((found - right).abs().max()):.2g} from autograd."
    return "equal to autograd, from the saved pair and one block of keys: nothing else has to be kept."


# ---- 05.flops


def packed_flops(lengths: list[int], heads: int, head_dim: int) -> int:
    """Forward and backward FLOPs of causal attention over masked documents, no recompute: 3.5 x 2 n^2 H D each."""
    return sum(7 * n * n * heads * head_dim for n in lengths)


def check_flops(answer: Any) -> str:
    """FLOP of one document and of two in a row."""
    for lengths in ([1000], [600, 400]):
        right, found = packed_flops(lengths, 32, 128), answer(list(lengths), 32, 128)
        total = sum(lengths)
        assert len(lengths) == 1 or found != packed_flops([total], 32, 128), (
            "That is the whole row's work. Documents don't see each other: each counts by the square of its own length."
        )
        assert found != 2 * right, "Twice too many: under a causal mask half of the pairs are computed."
        assert found * 7 != 2 * right, "That is the forward pass; the backward pass makes five products instead of two."
        diagonal = 7 * sum(lengths) * 32 * 128  # of n (n + 1) / 2 pairs, counted exactly; n^2 / 2 is usual
        assert found in (right, right + diagonal), f"Documents of {lengths} take {right:,} FLOPs, yours says {found:,}."
    return "a row of many documents is much less work than one document of its length."
