"""Who holds what, and which kernel calls follow from it, against brute force; no process is started here."""

from itertools import accumulate, pairwise

import pytest
import torch
from attention_yardstick import visible
from hypothesis import given, settings
from hypothesis import strategies as st

from ultralong.attention import balance
from ultralong.attention.balance import (
    HEAVY,
    balanced,
    by_documents,
    cost,
    imbalance,
    sends_nothing,
    subset,
    work,
)
from ultralong.attention.kv_plan import exchange_plan, plan_kv
from ultralong.attention.layout import contiguous, zigzag
from ultralong.attention.ring import circulating_ranges, own_segments, rectangles
from ultralong.attention.ring.plan import RingPlan
from ultralong.attention.ulysses import head_chunk_counts, head_split
from ultralong.bench.attention.measure import documents

MAKERS = {"contiguous": contiguous, "zigzag": zigzag}


@st.composite
def rows(draw):
    """Length, ranks, members, document boundaries (one-token documents are frequent)."""
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=12))
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return edges[-1], draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3])), tuple(edges)


def layouts(tokens, ranks, inner, edges):
    return [
        contiguous(tokens, ranks, inner),
        zigzag(tokens, ranks, inner),
        balanced(tokens, ranks, edges, inner, smallest=1, good_enough=0.0),
        *(
            by_documents(tokens, ranks, edges, inner, heavy, order, whole=whole)
            for heavy, order, whole in ((HEAVY[0], 0, False), (0.0, 1, False), (1.0, 1, True))
        ),
    ]


def closed(edges, padded):
    return edges if edges[-1] == padded else (*edges, padded)


@given(row=rows())
def test_every_token_has_one_holder_and_comes_back(row):
    tokens, ranks, inner, _ = row
    x = torch.arange(tokens * 2).reshape(1, tokens, 2)
    for layout in layouts(*row):
        held = [layout.shard(x, process, dim=1, pad=-1) for process in range(ranks * inner)]
        assert {part.shape for part in held} == {(1, layout.local, 2)}
        everyone = torch.cat([layout.positions(process) for process in range(ranks * inner)])
        assert sorted(everyone.tolist()) == list(range(layout.padded))
        assert layout.padded - tokens < 16 * 2 * ranks * inner
        assert all(a < b < c for own in layout.owned for (a, b), (c, _) in pairwise([*own, (layout.padded + 1, 0)]))
        for process, part in enumerate(held):
            at = layout.positions(process)
            real = at < tokens
            assert torch.equal(part[0, real], x[0, at[real]])
            assert (part[0, ~real] == -1).all()
        assert torch.equal(layout.restore(torch.cat(held, 1), 1), x)


def test_a_tensor_of_another_length_is_refused():
    with pytest.raises(ValueError, match="10 tokens, dimension 1 of the tensor has 9"):
        zigzag(10, 2).shard(torch.zeros(1, 9), 0)
    with pytest.raises(ValueError, match="at least 1 token, found 0"):
        zigzag(0, 2)


@given(row=rows(), data=st.data())
def test_work_counts_query_key_pairs(row, data):
    tokens, _, _, edges = row
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, tokens))
    seen = visible(tokens, tokens, edges_q=edges, edges_k=edges)
    assert work(start, stop, edges) == int(seen[start:stop].sum())


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_zigzag_is_perfectly_balanced_without_documents_and_contiguous_is_not(ranks):
    tokens = 2 * ranks * 64
    assert imbalance(zigzag(tokens, ranks), (0, tokens)) == 1.0
    expected = (2 * ranks - 1) / ranks  # the last of P equal runs against the mean
    assert imbalance(contiguous(tokens, ranks), (0, tokens)) == pytest.approx(expected, rel=0.02)
    assert balanced(tokens, ranks, (0, tokens)) == zigzag(tokens, ranks)


@pytest.mark.parametrize(("ranks", "most"), [(4, 1.18), (8, 1.5)])
def test_32_documents_of_mixed_length_cost_little_more_than_their_work(ranks, most):
    edges = documents(131072, 32)
    layout = balanced(131072, ranks, edges)
    mean = work(0, 131072, edges) / ranks
    assert cost(layout, edges) <= most * mean
    assert cost(layout, edges) <= cost(zigzag(131072, ranks), edges)
    assert imbalance(layout, edges) <= cost(layout, edges) / mean


@pytest.mark.parametrize("tokens", [32768, 131072, 524288])
def test_32_documents_of_mixed_length_are_whole_on_two_ranks_with_equal_work(tokens):
    edges = documents(tokens, 32)
    layout = balanced(tokens, 2, edges)
    assert imbalance(layout, edges) <= 1.001
    for rank in range(2):
        route = exchange_plan(layout, rank, edges, None)
        assert route.is_local, "nothing is sent"
        assert [call.segments.shared for call in route.kv_plan.calls] == [frozenset()], "one call of whole documents"


def test_the_first_layout_that_is_good_ends_the_search(monkeypatch):
    """1,000 documents over 32 ranks: every further layout takes as long as the first."""
    made = []
    monkeypatch.setattr(balance, "by_documents", lambda *args, **kw: made.append(by_documents(*args, **kw)) or made[-1])
    edges = documents(2**20, 1000)
    layout = balanced(2**20, 32, edges)
    assert made == [layout]
    assert sends_nothing(layout, edges)
    assert imbalance(layout, edges) <= 1.005


@pytest.mark.parametrize("ranks", [2, 4])
def test_documents_of_equal_length_are_dealt_out_whole(ranks):
    """Millions of their subsets have the same length."""
    edges = tuple(range(0, 2**17 + 1, 2**11))
    layout = balanced(2**17, ranks, edges)
    assert imbalance(layout, edges) == 1.0
    assert all(exchange_plan(layout, rank, edges, None).is_local for rank in range(ranks))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), share=st.floats(0, 1), data=st.data())
def test_a_subset_has_the_tokens_asked_for_and_the_work_nearest(lengths, share, data):
    edges = [0, *accumulate(lengths)]
    pieces = list(pairwise(edges))
    asked = data.draw(st.one_of(st.integers(0, edges[-1]), st.sampled_from(edges)))
    wanted = share * work(0, edges[-1], edges)
    sets = [[piece for bit, piece in enumerate(pieces) if index >> bit & 1] for index in range(2 ** len(pieces))]
    sets = [chosen for chosen in sets if sum(b - a for a, b in chosen) == asked]
    found = subset(pieces, asked, wanted)
    if not sets:
        assert found is None
        return
    assert set(found) <= set(pieces)
    assert sum(b - a for a, b in found) == asked
    far = [abs(sum(work(a, b, edges) for a, b in chosen) - wanted) for chosen in (found, *sets)]
    assert far[0] == min(far[1:])


def test_300_documents_over_8_ranks_are_not_cut_but_to_fill_up():
    edges = documents(2**20, 300)
    layout = balanced(2**20, 8, edges)
    assert imbalance(layout, edges) <= 1.01
    routes = [exchange_plan(layout, rank, edges, None) for rank in range(8)]
    assert max(route.kv_plan.tokens - layout.held for route in routes) < 4096
    assert [len(route.kv_plan.calls) for route in routes] == [1] * 8


def in_front(found, layout, rank, rules):
    """Global positions of the keys in front of a rank, put there as the exchange puts them; -1 where nothing came."""
    keys = torch.full((found.kv_plan.tokens,), -1)
    for other in range(layout.ranks):
        theirs = layout.positions(other)
        if other == rank:
            sent = [(theirs[local], place) for local, place in found.own]
        else:
            route = exchange_plan(layout, other, *rules)
            sent = [(theirs[local], place) for local, place in zip(route.send[rank], found.recv[other], strict=True)]
            for (positions, _), place in zip(sent, route.grad_recv[rank], strict=True):
                held = [(local, front) for local, front in route.own if front.start <= place.start < front.stop]
                assert torch.equal(theirs[held[0][0]][place.start - held[0][1].start :][: len(positions)], positions)
        for positions, place in sent:
            assert (keys[place] == -1).all(), "nothing is put over another"
            keys[place] = positions
    return keys


@settings(max_examples=150)
@given(row=rows(), masked=st.booleans(), window=st.one_of(st.none(), st.integers(1, 30)))
def test_gathered_calls_see_exactly_what_the_definition_says(row, masked, window):
    """Each rank's keys come from their holders, and its calls see all that the definition says and nothing else."""
    tokens, ranks, _, edges = row
    for layout in layouts(tokens, ranks, 1, edges):
        bounds = closed(edges, layout.padded) if masked else (0, layout.padded)
        rules = (bounds if masked else None, window)
        seen = visible(layout.padded, layout.padded, window=window, edges_q=bounds, edges_k=bounds)
        shares = torch.zeros(layout.padded, dtype=torch.long)
        calls = []
        for rank in range(ranks):
            mine, route = layout.positions(rank), exchange_plan(layout, rank, *rules)
            keys = in_front(route, layout, rank, rules)
            assert torch.equal(keys, keys.sort().values)
            assert not route.is_local or torch.equal(keys, mine), "what is held stands in front as it is"
            if len(route.kv_plan.calls) == 1 and (segments := route.kv_plan.calls[0].segments):
                edges_k = [segments.k[piece : piece + 2] for piece in segments.shared]
                for place in (place for places in (*route.recv, *route.grad_recv) for place in places):
                    assert any(a <= place.start and place.stop <= b for a, b in edges_k), "each has one share"
            found = torch.zeros(layout.held, layout.padded, dtype=torch.bool)
            for call in route.kv_plan.calls:
                queries, columns = call.queries.stop - call.queries.start, keys[call.keys]
                edges_q = call.segments.q if call.segments else (0, queries)
                edges_k = call.segments.k if call.segments else (0, len(columns))
                block = visible(queries, len(columns), window=window, edges_q=edges_q, edges_k=edges_k)
                assert not found[call.queries].any()
                found[call.queries, columns] = block
                shares[columns] += 1
                calls.append((call, columns))
            assert torch.equal(found, seen[mine])
            assert len(keys) <= (seen[mine].any(0).sum() if window is None else layout.padded), "nothing comes in vain"
        for call, columns in calls:
            for piece in range(call.segments.count if call.segments else 0):
                keys = columns[call.segments.k[piece] : call.segments.k[piece + 1]]
                assert call.segments.is_shared(piece) or (shares[keys] == 1).all(), "a shared piece is said to be one"


@settings(max_examples=150)
@given(row=rows(), masked=st.booleans())
def test_ring_blocks_see_every_pair_once(row, masked):
    tokens, ranks, _, edges = row
    for layout in layouts(tokens, ranks, 1, edges):
        bounds = closed(edges, layout.padded) if masked else (0, layout.padded)
        seen = visible(layout.padded, layout.padded, edges_q=bounds, edges_k=bounds)
        for rank in range(ranks):
            mine = layout.positions(rank)
            segments = own_segments(layout.ranges(rank), bounds) if masked else None
            cuts = segments.q if segments else (0, layout.local)
            own = visible(layout.local, layout.local, edges_q=cuts, edges_k=cuts)
            assert torch.equal(own, seen[mine][:, mine])
            elsewhere = seen[torch.cat([layout.positions(r) for r in range(ranks) if r != rank] or [mine[:0]])][:, mine]
            for piece in range(segments.count if segments else 0):
                keys = slice(segments.k[piece], segments.k[piece + 1])
                assert segments.is_shared(piece) or not elsewhere[:, keys].any(), "a shared piece is said to be one"
            for other in range(ranks):
                if other == rank:
                    continue
                found = torch.zeros(layout.local, layout.padded, dtype=torch.int)
                sent = circulating_ranges(layout.ranges(other), layout.padded, bounds if masked else None)
                positions = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in sent)])
                for rows_, keys in rectangles(layout.ranges(rank), sent, bounds if masked else None):
                    found[rows_, positions[keys]] += 1
                theirs = layout.positions(other)
                assert torch.equal(found[:, theirs], seen[mine][:, theirs].int())
                assert found.sum() == found[:, theirs].sum(), "only the other rank's own tokens travel"


@settings(max_examples=30)
@given(row=rows(), masked=st.booleans(), window=st.integers(1, 30))
def test_ring_blocks_under_a_window_see_every_pair_once(row, masked, window):
    tokens, ranks, _, edges = row
    for layout in layouts(tokens, ranks, 1, edges):
        bounds = closed(edges, layout.padded) if masked else (0, layout.padded)
        seen = visible(layout.padded, layout.padded, window=window, edges_q=bounds, edges_k=bounds)
        for rank in range(ranks):
            plan = RingPlan(rank, layout, bounds if masked else None, window)
            mine, cuts = layout.positions(rank), plan.segments.q if plan.segments else (0, layout.local)
            found = torch.zeros(layout.local, layout.padded, dtype=torch.int)
            found[:, mine] += visible(layout.local, layout.local, window=window, edges_q=cuts, edges_k=cuts).int()
            held = [torch.arange(*at) for at in layout.ranges(rank)]
            parts = [(held, plan.own_blocks)]
            for hop, blocks in enumerate(plan.blocks, start=1):
                parts.append(([torch.arange(*at) for at in plan.circulating[hop]], blocks))
            for positions, blocks in parts:
                for rows_, keys, cut in blocks:
                    at = torch.cat(positions)[keys]
                    found[rows_, at] += visible(found[rows_].shape[0], len(at), causal=False, window=cut).int()
            assert torch.equal(found, seen[mine].int())
            for rank_behind in range(ranks):
                assert plan.tokens(rank_behind) <= len(plan.circulating[rank_behind]) * (window - 1)


def test_an_unpacked_ring_step_is_one_rectangle():
    layout = zigzag(64, 4)
    for rank in range(4):
        for other in set(range(4)) - {rank}:
            ((rows_, keys),) = rectangles(layout.ranges(rank), layout.ranges(other), None)
            area = (rows_.stop - rows_.start) * (keys.stop - keys.start)
            assert area == layout.local**2 // 2, "every hop is half a square of work, for every rank"


@given(kv=st.integers(1, 12), group=st.integers(1, 8), degree=st.integers(1, 16))
def test_heads_are_split_evenly_or_refused(kv, group, degree):
    heads = kv * group
    if heads % degree:
        with pytest.raises(ValueError, match=f"can't split {heads} query and {kv} kv heads over {degree} ranks"):
            head_split(heads, kv, degree)
        return
    try:
        each, serves = head_split(heads, kv, degree)
    except ValueError:
        repeats = [r for r in range(1, heads + 1) if (kv * r) % degree == 0 and heads % (kv * r) == 0]
        assert repeats == [], "refused though repeating kv heads would have done"
        return
    assert each * serves * degree == heads
    assert (each * degree) % kv == 0
    counts = head_chunk_counts(heads, kv, degree)
    assert counts[0] == 1
    assert all(b > a for a, b in pairwise(counts))
    assert all((each * serves) % count == 0 for count in counts)


def test_thousands_of_documents_are_dealt_out_as_well():
    """As packed chats are: 8,192 documents, on every rank its share of the work, and little to send."""
    edges = (0, *(64 * i + i % 11 for i in range(1, 8192)), 2**19)
    layout = balanced(2**19, 8, edges)
    assert imbalance(layout, edges) <= 1.03
    for pieces in layout.owned:
        seen = plan_kv(pieces, edges)
        assert seen.tokens - layout.held < 0.01 * layout.held
        assert seen.tokens == sum(b.stop - b.start for other in layout.owned for _, b in seen.overlap(other))
