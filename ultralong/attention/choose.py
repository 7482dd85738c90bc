"""Which scheme computes a row's attention, in how many head chunks, who holds which tokens: a context is made.

Legend: T tokens of the row, P ranks, H query heads, K kv heads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch.distributed as dist
from torch import Tensor

from ultralong.attention.balance import balanced, cost, sends_nothing, work
from ultralong.attention.collectives import GroupOrMesh, two_levels
from ultralong.attention.context import AttentionContext
from ultralong.attention.cost_model import H200
from ultralong.attention.kernels import KERNELS, Kernel
from ultralong.attention.layout import Layout, contiguous, zigzag
from ultralong.attention.protocol import AttentionOutputStore
from ultralong.attention.spec import check_anchors, check_boundaries, check_heads
from ultralong.attention.ulysses import head_chunk_counts, head_split

log = logging.getLogger(__name__)

SCHEMES = ("single", "ulysses", "gathered", "ring", "hybrid-gathered", "hybrid-ring")
LONG_ROW = 65536  # tokens from which a kernel's start is short beside its run even for a part of the heads
WORTHWHILE = 0.98  # cost over that of Ulysses, which needs no balance, from which another scheme is taken


@dataclass(frozen=True)
class RowSpec:
    """What is known of a row when its scheme is chosen.

    Attributes:
        tokens: Its length T.
        boundaries: Document boundaries when documents don't see each other, else None.
        heads: H.
        kv_heads: K.
        head_chunks: Head chunks, if somebody asked for a number.
    """

    tokens: int
    boundaries: tuple[int, ...] | None
    heads: int
    kv_heads: int
    head_chunks: int | None = None


def choose_scheme(scheme: str, outer: int, inner: int, row: RowSpec) -> tuple[str, str]:
    """The scheme's name, and why.

    Args:
        scheme: "auto", or one of `SCHEMES`.
        outer: Ranks of the first level.
        inner: Ranks of the second level.
        row: The row.

    Raises:
        ValueError: The scheme is unknown, or is for another number of levels.
    """
    if scheme not in ("auto", *SCHEMES):
        raise ValueError(f"scheme must be one of {', '.join(('auto', *SCHEMES))}; found {scheme!r}")
    if outer == 1:
        return "single", "one process"
    if inner > 1:
        if scheme not in ("auto", "hybrid-gathered", "hybrid-ring"):
            raise ValueError(
                f"scheme {scheme!r} takes one level of ranks, found {outer} x {inner}: use "
                "'hybrid-gathered' or 'hybrid-ring', or pass a group with all ranks"
            )
        if scheme != "auto":
            return scheme, "asked for"
        if row.boundaries is not None:
            return _logged("hybrid-gathered", outer * inner, f"{outer} hosts of {inner}; exact for packed documents")
        return _logged("hybrid-ring", outer * inner, f"{outer} hosts of {inner}; transfers between hosts are hidden")
    if scheme.startswith("hybrid"):
        raise ValueError(
            f"scheme {scheme!r} takes two levels of ranks (a 2-dimensional mesh, or a pair of groups), "
            f"found one of {outer}"
        )
    if scheme not in ("auto", "single"):
        return scheme, "asked for"
    if scheme == "single":
        raise ValueError(f"scheme 'single' is for one process, found a group of {outer}: pass group=None")
    try:
        head_split(row.heads, row.kv_heads, outer)
    except ValueError:
        return _logged(
            "gathered", outer, f"{row.heads} query and {row.kv_heads} kv heads can't be split over {outer} ranks"
        )
    if _documents_stay(row, outer):
        return _logged("gathered", outer, "whole documents on one rank each: less to send than all tokens' heads")
    return _logged("ulysses", outer, f"the heads split over {outer} ranks: equal work for any documents")


def _documents_stay(row: RowSpec, ranks: int) -> bool:
    """Whether whole documents on ranks cost less than Ulysses' all-to-alls, as they do where they are short."""
    if row.boundaries is None:
        return False
    if row.head_chunks is not None and row.head_chunks not in _counts("gathered", row, ranks):
        return False
    ulysses = _ulysses_cost(row, ranks, choose_head_chunks("ulysses", ranks, row))
    return cost(choose_layout(row, ranks, 1), row.boundaries) < WORTHWHILE * ulysses


def _exchange_cost(tokens: float, degree: int, group: int) -> float:
    """Cost of the all-to-alls for a rank, both passes together, in query-key pairs.

    Args:
        tokens: Tokens that the rank holds.
        degree: Ranks.
        group: Query heads of a kv head.
    """
    # q, k, v there and out back; q, k, v, out and its gradient there and three gradients back: 12 (H + K) D bytes,
    # where a key and value seen from another rank (`CostModel.pairs_per_token`) are 16 K D.
    return H200.pairs_per_token * tokens * 0.75 * (group + 1) * (degree - 1) / degree


def _ulysses_cost(row: RowSpec, ranks: int, head_chunks: int) -> float:
    """Cost of Ulysses for a rank, in query-key pairs: its work, and the exchange of one chunk, as others' is hidden."""
    exchange = _exchange_cost(row.tokens / ranks, ranks, row.heads // row.kv_heads) / head_chunks
    boundaries = row.boundaries or (0, row.tokens)
    pairs = work(0, row.tokens, boundaries) / ranks
    return pairs + H200.pairs_per_call + H200.pairs_per_exchange + exchange


def whole_documents(row: RowSpec, processes: int) -> Layout | None:
    """The layout in which every document is on one process, so that no scheme has anything to exchange.

    Args:
        row: The row.
        processes: That share it, of all levels.

    Returns:
        None where documents see each other, can't be assigned so, or only so unevenly that an exchange costs less.
    """
    if row.boundaries is None or processes == 1:
        return None
    layout = choose_layout(row, processes, 1)
    if sends_nothing(layout, row.boundaries) and cost(layout, row.boundaries) < WORTHWHILE * _ulysses_cost(
        row, processes, 1
    ):
        return layout
    return None


def _default_head_chunks(counts: Sequence[int], tokens: int, boundaries: Sequence[int] | None, kv: int) -> int:
    """One chunk, or up to four on long rows of short documents, not splitting a kv head's query heads.

    A token's exchange takes as long as some 1,000 query-key pairs (`ultralong.attention.cost_model`), which shows where
    documents are short: the exchange of one chunk then overlaps with the computation of another.

    Args:
        counts: The numbers of head chunks that split the heads evenly.
        tokens: Length of the row.
        boundaries: Document boundaries when documents don't see each other, else None.
        kv: Kv heads of a rank.
    """
    if boundaries is None or tokens < LONG_ROW:
        return 1
    if work(0, tokens, boundaries) >= 12 * H200.pairs_per_token * tokens:
        return 1
    return max(count for count in counts if count <= min(4, max(1, kv)))


def choose_head_chunks(scheme: str, degree: int, row: RowSpec) -> int:
    """The number of head chunks of Ulysses over `degree` ranks, of gathered keys, or of one process's backward pass.

    Raises:
        ValueError: The number asked for does not split the heads.
    """
    counts = _counts(scheme, row, degree)
    if row.head_chunks is None:
        few = row.kv_heads // degree
        return _default_head_chunks(counts, row.tokens, row.boundaries, few) if scheme == "ulysses" else 1
    if row.head_chunks not in counts:
        raise ValueError(
            f"head_chunks must be one of {counts} for {row.heads} query and {row.kv_heads} kv heads under "
            f"scheme {scheme!r}, found {row.head_chunks}"
        )
    return row.head_chunks


def _counts(scheme: str, row: RowSpec, degree: int) -> list[int]:
    """The head chunks that a scheme can have."""
    if scheme == "gathered" or (scheme == "single" and degree == 1):
        return [count for count in range(1, row.kv_heads + 1) if row.kv_heads % count == 0]
    return head_chunk_counts(row.heads, row.kv_heads, degree) if degree > 1 else [1]


@cache
def _logged(name: str, ranks: int, reason: str) -> tuple[str, str]:
    log.info("sequence-parallel attention over %d ranks: %s (%s)", ranks, name, reason)
    return name, reason


@lru_cache(maxsize=8)
def choose_layout(row: RowSpec, outer: int, inner: int) -> Layout:
    """Who holds which tokens, over `outer` ranks of `inner` members each."""
    if outer == 1:
        return contiguous(row.tokens, 1, inner)
    if row.boundaries is None:
        return zigzag(row.tokens, outer, inner)
    return balanced(row.tokens, outer, row.boundaries, inner)


def make_attention_context(
    tokens: int,
    group: GroupOrMesh | None = None,
    scheme: str = "auto",
    kernel: str | Kernel = "auto",
    boundaries: Tensor | Sequence[int] | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_chunks: int | None = None,
    store: AttentionOutputStore | None = None,
    anchors: Sequence[int] = (),
) -> AttentionContext:
    """Decide how one row's attention is computed. Every rank of the group calls it with the same arguments.

    Args:
        tokens: Length of the row; any length (it is padded inside).
        group: The processes that share the row: a process group, a 1-dimensional device mesh, or, for two levels, a
            2-dimensional mesh or a pair of groups (across hosts, inside the host). None: this process alone.
        scheme: "auto", or one of `SCHEMES`. The two hybrids run Ulysses inside the host, the named scheme across.
        kernel: "auto", one of `ultralong.attention.kernels.KERNELS`, or a `Kernel` of your own.
        boundaries: (N+1,) cumulative document lengths from 0 to `tokens` when documents must not see each other; None
            when every token sees all before it (the recipe's way). Where whole documents can be assigned evenly,
            nothing is exchanged, whatever the scheme.
        heads: Query heads of the model.
        kv_heads: Kv heads of the model, as many as query heads by default.
        head_chunks: Number of head chunks of Ulysses and of gathered keys. Transfers of one chunk run beside the
            computing of another, and more chunks make the exchanged buffers smaller; each costs a little. None is 1,
            and up to 4 for Ulysses on long rows of short documents. One process computes the backward pass of one
            chunk after another, which makes the kernel's float32 buffers smaller.
        store: Stores attention outputs over recomputed forward passes.
        anchors: First tokens of documents, rising; each is seen by all tokens behind it up to the next, whatever their
            document (AnchorAttention, arXiv 2411.13476).

    Raises:
        ValueError: A name is unknown, boundaries don't rise or don't end at `tokens`, heads can't be split, or the
            group does not fit the scheme; says what was found and what to do.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_heads(heads, kv_heads)
    if isinstance(kernel, str) and kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be one of {', '.join(('auto', *KERNELS))}; found {kernel!r}")
    edges = None if boundaries is None else check_boundaries(boundaries, tokens)
    edges = None if edges is not None and len(edges) == 2 else edges
    outer, inner = two_levels(group)
    outer_size, inner_size = (1 if g is None else dist.get_world_size(g) for g in (outer, inner))
    row = RowSpec(tokens, edges, heads, kv_heads, head_chunks)
    name, reason = choose_scheme(scheme, outer_size, inner_size, row)
    if name == "ulysses":
        outer, inner, outer_size, inner_size = None, outer, 1, outer_size
    if inner is not None:
        head_split(heads, kv_heads, inner_size)
    head_chunks = choose_head_chunks(name, inner_size, row)
    whole = whole_documents(row, outer_size * inner_size) if inner is not None else None
    if whole is not None:
        reason += "; whole documents on every process, nothing is exchanged"
    layout = whole or choose_layout(row, outer_size, inner_size)
    outer_rank, inner_rank = (0 if g is None else dist.get_rank(g) for g in (outer, inner))
    check_anchors(anchors, edges)
    if edges is not None and edges[-1] != layout.padded:
        edges = (*edges, layout.padded)
    process = outer_rank * inner_size + inner_rank
    return AttentionContext(
        tokens,
        layout,
        process,
        name,
        kernel,
        heads,
        kv_heads,
        edges,
        outer,
        inner,
        head_chunks,
        store,
        reason,
        tuple(anchors) if edges else (),
    )
