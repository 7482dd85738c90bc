"""Every scheme on real processes against one process: outputs and every gradient, of attention and of whole models."""

import os
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from attention_yardstick import plain_attention, random_qkv, relative, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import ultralong.attention as ua
from ultralong.attention import PeerLost, choose, gathered, make_attention_context
from ultralong.attention.balance import balanced, by_documents
from ultralong.attention.collectives import copy_rows
from ultralong.attention.layout import zigzag
from ultralong.attention.ulysses import head_chunk_counts
from ultralong.bench.attention.error_curve import error_curve
from ultralong.utils.local_ranks import RankFailed, run_ranks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ONE_LEVEL = ("ulysses", "gathered", "ring")
HEADS = ((8, 8), (8, 1), (24, 3), (9, 3), (16, 8), (4, 4))
# Layouts of packed rows: the one of least cost, of short rows most often whole documents, and two that cut documents.
LAYOUTS = {
    "chosen": balanced,
    "zigzag": lambda tokens, ranks, edges, inner: zigzag(tokens, ranks, inner),
    "cut": partial(by_documents, heavy=0.0, order=1),
}


def context_with(layout, *arguments, **options):
    """A context whose packed rows are shared out by one of `LAYOUTS`."""
    choose.choose_layout.cache_clear()
    with patch.object(choose, "balanced", LAYOUTS[layout]):
        return make_attention_context(*arguments, **options)


def wanted(tokens, edges, window, heads, kv_heads, dtype, seed, batch, sink):
    """Inputs, and output and gradients of attention written out on one process in float64."""
    q, k, v, dout = random_qkv(seed, batch, tokens, tokens, heads, kv_heads, 8, dtype)
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    sinks = torch.linspace(-2, 2, heads, dtype=torch.float64, requires_grad=True) if sink else None
    edges = edges or (0, tokens)
    out, _ = plain_attention(*leaves, visible(tokens, tokens, window=window, edges_q=edges, edges_k=edges), sink=sinks)
    out.backward(dout.double())
    return (q, k, v, dout), [out.detach(), *(x.grad for x in leaves)], None if sinks is None else sinks.grad


def error_of(context, inputs, expected, window=None, sink=None, sink_grad=None):
    """Largest relative error of output and gradients over all ranks."""
    q, k, v, dout = inputs
    leaves = [context.shard(x).clone().requires_grad_() for x in (q, k, v)]
    sinks = None if sink is None else sink.clone().requires_grad_()
    out = context.attend(*leaves, window=window, sink=sinks)
    out.backward(context.shard(dout))
    parts = [x.detach() for x in (out, *(leaf.grad for leaf in leaves))]
    together = context.unshard(torch.cat(parts, 2)).double()  # one exchange, not four
    found = together.split([x.shape[2] for x in parts], 2)
    errors = [relative(a, b) for a, b in zip(found, expected)]
    if sinks is not None:
        total = sinks.grad.double()
        dist.all_reduce(total)
        errors.append(relative(total, sink_grad))
    return everywhere(max(errors))


def everywhere(value):
    """The largest over ranks, so that every rank sees the same failure and tries the same next example."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.item()


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=8))
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return SimpleNamespace(
        tokens=edges[-1],
        edges=tuple(edges) if draw(st.booleans()) else None,
        heads=draw(st.sampled_from(HEADS)),
        scheme=draw(st.sampled_from(ONE_LEVEL)),
        seed=draw(st.integers(0, 2**20)),
        batch=draw(st.sampled_from([1, 1, 2])),
        window=draw(st.sampled_from([None, None, 1, 7])),
        sink=draw(st.booleans()),
        stage=draw(st.integers(0, 5)),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        layout=draw(st.sampled_from(list(LAYOUTS))),
    )


def check_case(case, group, tried):
    heads, kv_heads = case.heads
    window = case.window
    head_chunks = [1, kv_heads][case.stage % 2] if case.scheme == "gathered" and dist.get_world_size() > 1 else None
    if case.scheme == "ulysses":
        try:
            counts = head_chunk_counts(heads, kv_heads, dist.get_world_size())
        except ValueError:
            with pytest.raises(ValueError, match=r"can't split .* Use scheme='gathered'"):
                make_attention_context(case.tokens, group, "ulysses", heads=heads, kv_heads=kv_heads)
            return
        head_chunks = counts[case.stage % len(counts)] if dist.get_world_size() > 1 else 1
    context = context_with(
        case.layout,
        case.tokens,
        group,
        case.scheme,
        boundaries=case.edges,
        heads=heads,
        kv_heads=kv_heads,
        head_chunks=head_chunks,
    )
    inputs, expected, sink_grad = wanted(
        case.tokens, case.edges, window, heads, kv_heads, case.dtype, case.seed, case.batch, case.sink
    )
    sink = torch.linspace(-2, 2, heads, dtype=case.dtype) if case.sink else None
    error = error_of(context, inputs, expected, window, sink, sink_grad)
    kind = (case.scheme, case.edges is not None, context.exchanges)
    tried[kind] = max(tried.get(kind, 0.0), error / TOLERANCE[case.dtype])
    assert error <= TOLERANCE[case.dtype], (case, error)


def many_cases(rank, world, examples):
    tried = {}

    @settings(max_examples=examples, database=None, deadline=None, derandomize=True)
    @given(case=cases())
    def check(case):
        check_case(case, dist.group.WORLD, tried)

    check()
    return tried


@pytest.mark.parametrize(
    ("world", "examples"), [(1, 40), (2, 120), (4, 60), pytest.param(8, 60, marks=pytest.mark.soak)]
)
def test_every_scheme_equals_one_process(world, examples):
    """Random documents, lengths, heads, batches, windows and sinks; float64 to 1e-12, float32 to 1e-5."""
    tried = run_ranks(many_cases, world, examples)[0]
    exchanges = {1: [(False, False), (True, False)], 2: [(False, True), (True, True), (True, False)]}
    needed = exchanges.get(world, [(False, True), (True, True)])  # few of these short rows are whole on more ranks
    assert set(tried) >= {(scheme, *kind) for scheme in ONE_LEVEL for kind in needed}


def whole(rank, world, shape):
    """Errors of packed rows of whole documents, and the schemes' names."""
    group = dist.group.WORLD if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("hosts", "gpus"))
    edges, found = (0, 5, 8, 13, 16, 21, 24, 29, 32), {}
    for scheme in ("ulysses", "gathered", "ring") if shape is None else ("auto", "hybrid-gathered", "hybrid-ring"):
        for tokens, stop in ((32, None), (31, 31)):  # one token of padding is a document too
            context = make_attention_context(
                tokens, group, scheme, boundaries=(*edges[:-1], stop or 32), heads=8, kv_heads=4
            )
            inputs, expected, sinks = wanted(tokens, (*edges[:-1], stop or 32), None, 8, 4, torch.float64, 7, 2, True)
            sink = torch.linspace(-2, 2, 8, dtype=torch.float64)
            q, k, v = (context.shard(x).requires_grad_() for x in inputs[:3])
            with patch.multiple(dist, batch_isend_irecv=None, all_to_all_single=None):
                context.attend(q, k, v, sink=sink).backward(context.shard(inputs[3]))
            found[scheme, tokens] = context.exchanges, error_of(context, inputs, expected, None, sink, sinks)
    return found


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_where_documents_are_whole_no_scheme_exchanges_anything(shape):
    found = run_ranks(whole, 2 if shape is None else 4, shape)[0]
    assert [exchanges for exchanges, _ in found.values()] == [False] * 6
    assert max(error for _, error in found.values()) <= 1e-12


def in_rounds(rank, world):
    """Errors where K and V in front of a rank don't fit at once: ranks that see different numbers of keys keep step."""
    errors = []
    for limit in (3 * 64 * 8 * 8, 1):  # bytes; a kv head of 64 keys takes 2 * 64 * 8 * 8, and the first rank sees all
        gathered.BUFFER_BYTES = limit
        for edges in (None, (0, 3, 40, 61)):
            context = make_attention_context(61, dist.group.WORLD, "gathered", boundaries=edges, heads=8, kv_heads=4)
            errors.append(error_of(context, *wanted(61, edges, None, 8, 4, torch.float64, 3, 1, False)[:2]))
    return max(errors)


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_keys_in_rounds_of_heads(world):
    assert max(run_ranks(in_rounds, world)) <= 1e-12


def two_levels(rank, world, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("hosts", "gpus"))
    worst = 0.0
    for scheme in ("hybrid-gathered", "hybrid-ring", "auto"):
        for edges in (None, (0, 1, 17, 18, 50, 61)):
            for heads, kv_heads in ((8, 8), (8, 1), (24, 3)):
                for head_chunks in head_chunk_counts(heads, kv_heads, shape[1])[:2]:
                    context = make_attention_context(
                        61, mesh, scheme, boundaries=edges, heads=heads, kv_heads=kv_heads, head_chunks=head_chunks
                    )
                    assert context.size == world
                    window = None if scheme == "auto" else 9
                    inputs, expected, sink_grad = wanted(61, edges, window, heads, kv_heads, torch.float64, 5, 1, True)
                    sink = torch.linspace(-2, 2, heads, dtype=torch.float64)
                    worst = max(worst, error_of(context, inputs, expected, window, sink, sink_grad))
    return worst


@pytest.mark.parametrize(
    "shape", [(2, 2), pytest.param((2, 4), marks=pytest.mark.soak), pytest.param((4, 2), marks=pytest.mark.soak)]
)
def test_two_levels_equal_one_process(shape):
    assert max(run_ranks(two_levels, shape[0] * shape[1], shape)) <= 1e-12


def probe(rank, world, masked):
    """For every scheme: is the output of document B the same to the last bit after document A has changed?"""
    edges, same = (0, 23, 61), {}
    for scheme in ONE_LEVEL:
        context = make_attention_context(
            61, dist.group.WORLD, scheme, boundaries=edges if masked else None, heads=8, kv_heads=2
        )
        outs = []
        for change in (0.0, 1.0):
            q, k, v, _ = random_qkv(1, 1, 61, 61, 8, 2, 8, torch.float32)
            for x in (q, k, v):
                x[:, :23] += change
            outs.append(context.unshard(context.attend(*(context.shard(x) for x in (q, k, v))))[:, 23:])
        same[scheme] = torch.equal(*outs)
    return same


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_documents_leak_exactly_when_they_are_meant_to(world, masked):
    assert run_ranks(probe, world, masked)[0] == dict.fromkeys(ONE_LEVEL, masked)


def tiny(family, implementation="ultralong"):
    """A tiny random model of a family, in float64."""
    import transformers as tf

    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    extra = {"Mistral": {"sliding_window": 9}, "Qwen2": {"layer_types": ["full_attention"] * 2}}.get(family, {})
    if family == "Qwen2":
        size.pop("head_dim")
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**size, **extra)
    return getattr(tf, f"{family}ForCausalLM")._from_config(config, attn_implementation=implementation).double()


def summed_loss(model, ids, labels, positions, **kwargs):
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def model_error(rank, world, family, scheme, edges, tokens=45):
    """Relative error of loss and of every parameter gradient against transformers' own sdpa with a full mask."""
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (1, tokens), generator=make)
    labels = torch.where(torch.rand(1, tokens, generator=make) < 0.2, -100, ids.roll(-1, 1))
    model = tiny(family)
    context = make_attention_context(tokens, dist.group.WORLD, scheme, boundaries=edges, heads=4, kv_heads=2)
    loss = summed_loss(
        model, context.shard(ids), context.shard(labels, pad=-100), context.positions(), attention_context=context
    )
    loss.backward()
    loss = loss.detach()
    for x in (loss, *(p.grad for p in model.parameters())):
        dist.all_reduce(x)
    plain = tiny(family, "sdpa")
    window = getattr(plain.config, "sliding_window", None)
    bounds = edges or (0, tokens)
    seen = visible(tokens, tokens, window=window, edges_q=bounds, edges_k=bounds)
    expected = summed_loss(plain, ids, labels, torch.arange(tokens)[None], attention_mask=seen[None, None])
    expected.backward()
    errors = [abs(loss.item() / expected.item() - 1)]
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert theirs.grad.abs().max() > 0, f"{name} has no gradient to compare"
        errors.append(relative(mine.grad, theirs.grad))
    return everywhere(max(errors))


def models(rank, world, families):
    return {
        (family, scheme, masked): model_error(rank, world, family, scheme, (0, 3, 4, 30, 45) if masked else None)
        for family in families
        for masked in (False, True)
        for scheme in ONE_LEVEL
    }


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_whole_models_have_the_loss_and_gradients_of_one_process(world):
    """Llama, Qwen2, Qwen3 and Mistral (sliding window), unmodified, at a length that divides by nothing."""
    found = run_ranks(models, world, ("Llama", "Qwen2", "Qwen3", "Mistral"))[0]
    assert len(found) == 24
    assert max(found.values()) <= 1e-10, {key: value for key, value in found.items() if value > 1e-10}


class Store:
    """Keeps every pair, and counts."""

    def __init__(self):
        self.pairs, self.taken = {}, 0

    def pop(self, layer):
        pair = self.pairs.pop(layer, None)
        self.taken += pair is not None
        return pair

    def save(self, layer, out, lse):
        self.pairs[layer] = (out, lse)


def kept(rank, world, scheme):
    """Gradients under activation checkpointing with a store and without checkpointing, and the kernel calls saved."""
    results, calls = [], []
    for store, recompute in ((None, False), (Store(), True)):
        context = make_attention_context(50, dist.group.WORLD, scheme, heads=4, kv_heads=2, store=store)
        leaves = [context.shard(x).clone().requires_grad_() for x in random_qkv(0, 1, 50, 50, 4, 2, 8)[:3]]
        inside = partial(counted, context, calls)
        out = checkpoint(inside, *leaves, use_reentrant=False) if recompute else inside(*leaves)
        out.sin().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        if store is not None:
            assert store.taken == 1
            assert not store.pairs
    assert calls == ["run", "run", "run"], "once plainly, and twice under checkpointing"
    return all(torch.equal(a, b) for a, b in zip(*results))


def counted(context, calls, q, k, v):
    calls.append("run")
    return context.attend(q, k, v).tanh()


@pytest.mark.parametrize("scheme", ONE_LEVEL)
def test_kept_results_are_not_computed_again(scheme):
    assert all(run_ranks(kept, 2, scheme))


def test_the_error_does_not_grow_with_the_number_of_ranks_but_for_the_ring():
    points = error_curve((1, 2, 4), tokens=256, dtypes=("float32", "bfloat16"), seeds=1, timeout=100)
    by = {(p.scheme, p.dtype, p.ranks): p for p in points}
    for dtype in ("float32", "bfloat16"):
        alone = by["single", dtype, 1]
        for ranks in (2, 4):
            assert max(by[scheme, dtype, ranks].out for scheme in ("ulysses", "gathered")) <= 1.1 * alone.out
            for scheme in ONE_LEVEL:  # sums over calls are rounded once
                assert by[scheme, dtype, ranks].dk <= 1.1 * alone.dk
                assert by[scheme, dtype, ranks].dv <= 1.1 * alone.dv
    assert by["ring", "bfloat16", 4].out <= 2 * by["single", "bfloat16", 1].out


def thrice(context, q, k, v):
    for _ in range(3):  # what a dead peer sent before it died may still arrive once
        context.attend(q, k, v)


def dies(rank, world, scheme):
    context = make_attention_context(64, dist.group.WORLD, scheme, heads=4, kv_heads=2)
    q, k, v, _ = (context.shard(x) for x in random_qkv(0, 1, 64, 64, 4, 2, 8))
    context.attend(q, k, v)
    if rank == 1:
        os._exit(3)
    started = time.monotonic()
    with pytest.raises(PeerLost, match="a peer has died, or did not arrive"):
        thrice(context, q, k, v)
    return time.monotonic() - started


@pytest.mark.parametrize("scheme", ONE_LEVEL)
def test_a_dead_rank_does_not_hang_the_others(scheme):
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"1 of 2 ranks failed:\n--- rank 1 ---\nprocess ended with exit code 3"):
        run_ranks(dies, 2, scheme, timeout=60)
    assert time.monotonic() - started < 50


def sleeps(rank, world):
    if rank == 1:
        time.sleep(60)
    return make_attention_context(8, dist.group.WORLD, "ulysses", heads=2).attend(
        *(torch.zeros(1, 4, 2, 8) for _ in range(3))
    )


def test_a_rank_that_does_not_arrive_is_a_timeout_with_a_message():
    with pytest.raises(RankFailed, match=r"--- rank 0 ---(.|\n)*did not arrive before the process group's timeout"):
        run_ranks(sleeps, 2, timeout=3)


def raises(rank, world):
    if rank == world - 1:
        raise KeyError("a reason")
    return rank


def multiplies(rank, world, factor):
    return rank * factor


def test_the_harness_reports_errors_and_results():
    with pytest.raises(RankFailed, match=r"--- rank 1 ---(.|\n)*KeyError: 'a reason'"):
        run_ranks(raises, 2, timeout=20)
    assert run_ranks(multiplies, 3, 7, timeout=20) == [0, 7, 14]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 8, 64])
def test_copying_in_wide_blocks_is_copying(dtype, size):
    source = torch.randn(3, 4, 6, size + 8).to(dtype)
    for start in (0, 1, 8):
        taken = source[:, 1:, ::2, start : start + size].permute(2, 0, 1, 3)
        target = torch.zeros(taken.shape, dtype=dtype)
        copy_rows(target, taken)
        assert torch.equal(target, taken)
        wide = torch.full((*taken.shape[:-1], size + 8), 7.0, dtype=dtype)
        copy_rows(wide[..., start : start + size], taken)
        assert torch.equal(wide[..., start : start + size], taken)
        assert (wide[..., :start] == 7).all()
        assert (wide[..., start + size :] == 7).all()


def bad_input(rank, world):
    group = dist.group.WORLD
    first = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process 1 is not a member of the group"):
            make_attention_context(16, first, heads=8)
    else:
        assert make_attention_context(16, first, heads=8).scheme == "single"
    good = partial(make_attention_context, 16, group, heads=8, kv_heads=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for call, message in (
        (partial(good, scheme="rings"), "scheme must be one of auto, .*'rings'"),
        (partial(good, kernel="fast"), "kernel must be one of auto, .*'fast'"),
        (partial(good, scheme="single"), "'single' is for one process, found a group of 2"),
        (partial(good, scheme="hybrid-ring"), "two levels of ranks .* found one of 2"),
        (partial(good, scheme="ulysses", head_chunks=3), r"head_chunks must be one of \[1, 2, 4\] .* found 3"),
        (partial(good, scheme="ring", head_chunks=2), r"one of \[1\] .* 'ring', found 2"),
        (partial(good, boundaries=[0, 8, 8, 16]), "must rise, found 8 followed by 8 at entry 2"),
        (partial(good, boundaries=[0, 9, 12]), "must end at the length 16, found 12"),
        (partial(good, boundaries=torch.tensor([1, 16])), "must begin with 0"),
        (partial(good, boundaries=torch.tensor([0.0, 16.0])), "int32 or int64 tensor, found torch.float32"),
        (partial(make_attention_context, 16, group, heads=9, kv_heads=2), "multiple of kv heads, found 9 and 2"),
        (partial(make_attention_context, 16, group, "ulysses", heads=9, kv_heads=3), r"lcm\(3, 2\) = 6"),
        (partial(make_attention_context, 0, group, heads=8), "at least 1 token, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert make_attention_context(16, mesh, "auto", heads=8).scheme == "ulysses"
    short, long = range(0, 2**17 + 1, 2**12), (0, 2**16, 2**17)
    for edges, tokens, heads, kv_heads, head_chunks in (
        (short, 2**17, 32, 8, 4),
        (short, 2**17, 32, 4, 2),
        (short, 2**17, 32, 1, 1),
        (long, 2**17, 32, 8, 1),
        (None, 2**17, 32, 8, 1),
        (range(0, 2**14 + 1, 2**10), 2**14, 32, 8, 1),
    ):
        assert (
            make_attention_context(
                tokens, group, "ulysses", boundaries=edges, heads=heads, kv_heads=kv_heads
            ).head_chunks
            == head_chunks
        )
    assert make_attention_context(16, group, "auto", heads=9, kv_heads=3).scheme == "gathered"
    for edges, head_chunks, scheme in (
        (short, None, "gathered"),
        (short, 4, "gathered"),
        (short, 16, "ulysses"),
        (long, None, "gathered"),
        ((0, 2**17 - 5, 2**17), None, "ulysses"),
        (None, None, "ulysses"),
    ):
        made = make_attention_context(
            2**17, group, "auto", boundaries=edges, heads=32, kv_heads=8, head_chunks=head_chunks
        )
        assert made.scheme == scheme, "documents stay on one rank where that balances"
    for edges, scheme in (
        (range(0, 2**13 + 1, 2**10), "gathered"),
        ((0, 2**13 - 5, 2**13), "ulysses"),
        (None, "ulysses"),
    ):
        assert make_attention_context(2**13, group, "auto", boundaries=edges, heads=8).scheme == scheme, (
            "as on short rows"
        )
    context = good(scheme="gathered")
    q, k = torch.zeros(1, 8, 8, 4), torch.zeros(1, 8, 2, 4)
    for tensors, message in (
        ((q, k, k.double()), r"one dtype, found torch.float32 and torch.float64 \(value\)"),
        ((q.int(), k, k), "query must be float16, .* found torch.int32"),
        ((q, k.to("meta"), k), r"one device, found cpu and meta \(key\)"),
        ((q[:, :7], k, k), r"query must be \(batch, 8 local tokens, 8 heads"),
        ((q, q, q), "2 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            context.attend(*tensors)
    with pytest.raises(ValueError, match="unshard has no gradient"):
        context.unshard(q.requires_grad_())
    with pytest.raises(ValueError, match="needs 8 local tokens along dimension 1, found 7"):
        context.unshard(torch.zeros(1, 7))
    return True


def test_bad_input_is_refused_with_the_value_and_the_rule():
    assert run_ranks(bad_input, 2) == [True, True]


def test_names_are_public():
    assert {"make_attention_context", "AttentionContext", "PeerLost", "KERNELS", "SCHEMES"} <= set(ua.__all__)
