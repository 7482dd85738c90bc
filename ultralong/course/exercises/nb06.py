"""Exercises of 06_sequence_parallel."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.nb06_checks import (
    check_all_to_all,
    check_deal,
    check_sees,
    check_zigzag,
    deal,
    deal_by_tokens,
    interleaved_tokens,
    not_contiguous,
    own_heads_only,
    sees,
    strided_heads,
    tokens_to_heads,
    zigzag,
)
from ultralong.course.exercises.nb06_ring_checks import (
    check_ring,
    ring,
    ring_blocks_lse,
    ring_keeps_shares,
    ring_sees_future,
    ring_stays_home,
)

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
            "given (`from ultralong.course.exercises.nb06_ring_checks import ...`); exchange by "
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
)
