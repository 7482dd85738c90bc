"""On GPUs: every kernel that is present against float32, at 2^32 elements too, and every scheme against its kernel."""

from functools import partial
from itertools import accumulate, pairwise
from unittest.mock import patch

import pytest
import torch

from ultralong.attention import available_kernels, choose, make_attention_context
from ultralong.attention.balance import by_documents
from ultralong.attention.kernels import (
    GQA,
    SOFTCAP,
    WINDOW,
    attention_backward,
    attention_forward,
    backward_accumulate,
    backward_with_partials,
    choose_kernel,
    flash_attn_4_hooks,
    get_kernel,
)
from ultralong.attention.kernels.fallbacks import head_groups
from ultralong.attention.spec import AttentionSpec, VarlenSegments
from ultralong.bench.attention.accuracy import exact_row, relative_errors
from ultralong.bench.attention.measure import SCHEMES, documents
from ultralong.utils.local_ranks import run_ranks

HAVE = torch.cuda.device_count()
EXACT = {name for name, kernel in available_kernels("cuda").items() if not kernel.approximate} if HAVE else set()
KERNELS = [name for name in available_kernels("cuda") if name in EXACT - {"reference"}] if HAVE else ["none"]
FAST = [name for name in KERNELS if name != "efficient"]
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(HAVE < 1, reason="needs a CUDA GPU")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(HAVE < 2, reason="needs two CUDA GPUs")]


def marked(marks):
    def mark(test):
        for each in marks:
            test = each(test)
        return test

    return mark


def tensors(tokens_q, tokens_k, heads, kv_heads, size, dtype, seed=0, device="cuda"):
    make = torch.Generator(device).manual_seed(seed)
    shapes = [(tokens_q, heads), (tokens_k, kv_heads), (tokens_k, kv_heads), (tokens_q, heads)]
    return [torch.randn(1, t, h, size, generator=make, device=device, dtype=dtype) for t, h in shapes]


def rms(found, exact):
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


CALLS = {
    "whole": (AttentionSpec(scale=0.1), 1000, 1000),
    "full": (AttentionSpec(scale=0.1, causal=False), 300, 1000),
    "clipped": (AttentionSpec(scale=0.1), 300, 1000),
    "one query": (AttentionSpec(scale=0.1), 1, 1000),
    "packed": (
        AttentionSpec(scale=0.1, segments=VarlenSegments((0, 1, 2, 500, 513, 1000), (0, 1, 2, 500, 513, 1000))),
        1000,
        1000,
    ),
    "packed and clipped": (
        AttentionSpec(scale=0.1, segments=VarlenSegments((0, 40, 41, 600), (0, 440, 441, 1000))),
        600,
        1000,
    ),
    "window": (AttentionSpec(scale=0.1, window=100), 1000, 1000),
    "window, packed and clipped": (
        AttentionSpec(scale=0.1, window=64, segments=VarlenSegments((0, 40, 41, 600), (0, 440, 441, 1000))),
        600,
        1000,
    ),
    "soft cap": (AttentionSpec(scale=0.1, softcap=2.0), 1000, 1000),
}


@marked(one_gpu)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (9, 3, 64)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_the_reference_in_float32(name, call, heads, kv_heads, size):
    kernel, (spec, tokens_q, tokens_k) = get_kernel(name), CALLS[call]
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    q, k, v, dout = tensors(tokens_q, tokens_k, heads, kv_heads, size, dtype)
    refused = kernel.unsupported_reason(q, spec)
    if refused:
        assert (spec.window and WINDOW not in kernel.features) or (spec.softcap and SOFTCAP not in kernel.features)
        return
    out, lse = attention_forward(kernel, q, k, v, spec)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    reference, wide = get_kernel("reference"), [x.float() for x in (q, k, v, dout)]
    exact, exact_lse = attention_forward(reference, *wide[:3], spec)
    wanted = attention_backward(reference, wide[3], *wide[:3], exact, exact_lse, spec)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (lse - exact_lse).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2)
    for part, found, expected in zip(("out", "dq", "dk", "dv"), (out, *grads), (exact, *wanted)):
        assert found.dtype == dtype
        assert rms(found, expected) <= limit, part


@marked(one_gpu)
@pytest.mark.parametrize("name", FAST)
def test_backward_takes_a_pair_that_was_merged(name):
    """A ring's case: the pair of all keys, the backward pass of some of them."""
    kernel, spec = get_kernel(name), AttentionSpec(scale=0.1, causal=False)
    q, k, v, dout = tensors(512, 1024, 8, 2, 128, torch.bfloat16)
    out, lse = attention_forward(kernel, q, k, v, spec)
    dq, dk, dv = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    a, b = (
        attention_backward(kernel, dout, q, k[:, part], v[:, part], out, lse, spec)
        for part in (slice(0, 256), slice(256, 1024))
    )
    assert rms(a[0].float() + b[0].float(), dq) <= 1e-2
    assert rms(torch.cat([a[1], b[1]], 1), dk) <= 1e-3
    assert rms(torch.cat([a[2], b[2]], 1), dv) <= 1e-3


@marked(one_gpu)
def test_what_this_machine_has():
    """cuDNN groups heads without copies, and auto takes the fastest kernel that is here."""
    if "cudnn" in KERNELS:
        assert GQA in get_kernel("cudnn").features
    q = torch.empty(1, 8, 8, 128, device="cuda", dtype=torch.bfloat16)
    assert choose_kernel("auto", q, AttentionSpec(scale=1.0)).name == KERNELS[0]
    assert choose_kernel("auto", q.float(), AttentionSpec(scale=1.0)).name == "efficient"


@marked(one_gpu)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (9, 3, 64), (4, 4, 128)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KERNELS)
def test_shares_are_added_to_what_is_there(name, call, heads, kv_heads, size, caplog):
    kernel, (spec, tokens_q, tokens_k) = get_kernel(name), CALLS[call]
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    q, k, v, dout = tensors(tokens_q, tokens_k, heads, kv_heads, size, dtype)
    if kernel.unsupported_reason(q, spec):
        return
    out, lse = attention_forward(kernel, q, k, v, spec)
    reference, wide = get_kernel("reference"), [x.float() for x in (dout, q, k, v, out)]
    wanted = attention_backward(reference, *wide, lse, spec)
    there = 2.0**-10  # as small as one query's gradients, which beside 1 would lose digits
    for _ in range(2):  # flash-attn 4 compares its sums with its result the first time only
        row = torch.full((2, 1, tokens_k + 3, kv_heads, size), there, device="cuda")
        dq = backward_accumulate(kernel, dout, q, k, v, out, lse, spec, row[0][:, 1:-2], row[1][:, 1:-2])
        assert (row[:, :, [0, -2, -1]] == there).all()
        for part, found, expected in zip(("dq", "dk", "dv"), (dq, *(row[:, :, 1:-2] - there)), wanted):
            assert rms(found, expected) <= (1e-5 if dtype == torch.float32 else 1e-2), part
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@marked(one_gpu)
@pytest.mark.skipif("flash4" not in KERNELS, reason="needs flash-attn 4")
@pytest.mark.parametrize("call", CALLS)
def test_flash_attn_4_is_right_with_the_tiles_for_many_keys(call, monkeypatch, caplog):
    monkeypatch.setattr(flash_attn_4_hooks, "FORWARD_KEYS", 0)
    monkeypatch.setattr(flash_attn_4_hooks, "BACKWARD_KEYS", 0)
    test_a_kernel_equals_the_reference_in_float32("flash4", call, 8, 2, 128)
    test_shares_are_added_to_what_is_there("flash4", call, 8, 2, 128, caplog)


@marked(one_gpu)
@pytest.mark.parametrize("turn", range(5))
def test_short_pieces_beside_each_other_and_long_ones_change_nothing(turn):
    """Of cuDNN, which takes pieces one by one; memory that streams of their own gave up is in use again each time."""
    lengths = [9000, 1, 300, 2048, 77, 4096, 12000, 513, 1024, 3000]
    lengths = lengths[turn:] + lengths[:turn]
    edges = (0, *accumulate(lengths))
    kernel, spec = get_kernel("cudnn"), AttentionSpec(128**-0.5)
    q, k, v, dout = tensors(edges[-1], edges[-1], 32, 8, 128, torch.bfloat16, seed=turn)
    packed = spec.with_segments(VarlenSegments(edges, edges, frozenset({1, 6})))
    out, lse = attention_forward(kernel, q, k, v, packed)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, packed)
    *finals, shares = backward_with_partials(kernel, dout, q, k, v, out, lse, packed)
    torch.full((2**28,), float("nan"), device="cuda")  # whatever was given up too early is no longer there
    shared = {keys.start: sides for keys, *sides in shares}
    assert sorted(shared) == [edges[1], edges[6]]
    for piece, (a, b) in enumerate(pairwise(edges)):
        at = slice(a, b)
        alone, alone_lse = attention_forward(kernel, q[:, at], k[:, at], v[:, at], spec)
        assert torch.equal(out[:, at], alone)
        assert torch.equal(lse[:, :, at], alone_lse)
        one = attention_backward(kernel, dout[:, at], q[:, at], k[:, at], v[:, at], alone, alone_lse, spec)
        wide = [finals[0][:, at], *(shared[a] if piece in {1, 6} else [grad[:, at] for grad in finals[1:]])]
        for expected, *found in zip(one, [grad[:, at] for grad in grads], wide, strict=True):
            most = 0.02 * expected.float().abs().max() + 1e-3  # of one token dq is nothing
            assert all((x.float() - expected.float()).abs().max() < most for x in found)


@marked(one_gpu)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", FAST)
def test_shares_of_two_calls_are_as_exact_as_one_call(name, size):
    """With grouped heads; a kernel that rounds each call's share makes 1.2 times one call's error."""
    kernel, (whole, full) = get_kernel(name), (AttentionSpec(scale=0.1), AttentionSpec(scale=0.1, causal=False))
    q, k, v, dout = tensors(4096, 4096, 8, 2, size, torch.bfloat16)
    wide = [x.float() for x in (q, k, v)]
    reference = get_kernel("reference")
    exact_out, exact_lse = attention_forward(reference, *wide, whole)
    wanted = attention_backward(reference, dout.float(), *wide, exact_out, exact_lse, whole)[1:]
    out, lse = attention_forward(kernel, q, k, v, whole)
    once = attention_backward(kernel, dout, q, k, v, out, lse, whole)[1:]
    half, total = 2048, torch.zeros(2, *k.shape, device="cuda")
    for rows, keys, spec in (
        (slice(0, half), slice(0, half), whole),
        (slice(half, None), slice(half, None), whole),
        (slice(half, None), slice(0, half), full),
    ):
        backward_accumulate(
            kernel,
            *(x[:, rows].contiguous() for x in (dout, q)),
            k[:, keys],
            v[:, keys],
            out[:, rows].contiguous(),
            lse[:, :, rows].contiguous(),
            spec,
            *total[:, :, keys],
        )
    ratios = [rms(found.to(torch.bfloat16), right) / rms(one, right) for found, one, right in zip(total, once, wanted)]
    print(name, size, *(f"{ratio:.3f}" for ratio in ratios))
    assert max(ratios) <= (1.3 if name == "flash3" else 1.1)


def errors_of_some_rows(kernel, tokens, heads, kv_heads):
    """Worst errors at 2^32 elements; gradients come from few queries, so that dk and dv can be checked exactly.

    A kernel that takes heads in groups below its index gets the heads of one group: the call that it makes for them.
    """
    size, spec = 128, AttentionSpec(scale=128**-0.5)
    q, k, v, dout = tensors(tokens, tokens, heads, kv_heads, size, torch.bfloat16)
    rows = torch.tensor([0, 77, tokens // 2 + 1, tokens - 1], device="cuda")
    planted, group = tokens // 3, heads // kv_heads
    k[0, planted] = 2 * q[0, tokens - 1].unflatten(0, (kv_heads, -1))[:, 0]  # the last token's first heads look here
    chosen = dout[:, rows].clone()
    dout.zero_()[:, rows] = chosen
    groups = head_groups(kernel, q, k)
    if len(groups) > 1 and tokens == 2**20:
        (a, b), (c, d) = groups[0]
        q, dout, chosen = (x[:, :, a:b].contiguous() for x in (q, dout, chosen))
        k, v = (x[:, :, c:d].contiguous() for x in (k, v))
    out, lse = attention_forward(kernel, q, k, v, spec)
    dq, dk, dv = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    seen, worst = torch.arange(tokens, device="cuda")[None] <= rows[:, None], {}  # (R, T)
    for kv in range(k.shape[2]):
        of = slice(kv * group, (kv + 1) * group)
        queries, keys, values, grad = q[0, rows, of].float(), k[0, :, kv].float(), v[0, :, kv].float(), chosen[0, :, of]
        scores = (torch.einsum("rgd,td->rgt", queries, keys) * spec.scale).masked_fill(~seen[:, None], float("-inf"))
        p, grad = scores.softmax(-1), grad.float()
        exact = torch.einsum("rgt,td->rgd", p, values)
        ds = p * (torch.einsum("rgd,td->rgt", grad, values) - (grad * exact).sum(-1, keepdim=True)) * spec.scale
        for part, found, right in (
            ("out", out[0, rows, of], exact),
            ("dq", dq[0, rows, of], torch.einsum("rgt,td->rgd", ds, keys)),
            ("dk", dk[0, :, kv], torch.einsum("rgt,rgd->td", ds, queries)),
            ("dv", dv[0, :, kv], torch.einsum("rgt,rgd->td", p, grad)),
        ):
            worst[part] = max(worst.get(part, 0.0), rms(found, right))
    return worst | {"planted": rms(out[0, -1, ::group], v[0, planted])}


@marked(one_gpu)
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**20, 32, 8), (2**17, 256, 64)], ids=["1M tokens", "256 heads"])
@pytest.mark.parametrize("name", FAST)
def test_a_million_tokens_with_2_to_the_32_elements(name, shape):
    """q has 2^32 elements, in a million tokens or in many heads; all four errors are printed before they are judged."""
    worst = errors_of_some_rows(get_kernel(name), *shape)
    print(name, *shape, *(f"{part} {error:.2e}" for part, error in worst.items()))
    # The last row looks at one key only, so its dq is a small difference of large numbers, of which one is rounded.
    limits = {"out": 1e-2, "dq": 5e-2, "dk": 2e-2, "dv": 2e-2, "planted": 0.2}
    assert {part: error for part, error in worst.items() if not error <= limits[part]} == {}


def scheme_errors(rank, world, name, lengths, dtype):
    """Errors by length, packed (documents are cut) or not, and scheme; `single` is the kernel on one GPU."""
    found = {}
    for tokens in lengths:
        row = tensors(tokens, tokens, 8, 2, 128, getattr(torch, dtype))
        for packed, edges in ((False, None), (True, documents(tokens, 32))):
            alone = make_attention_context(tokens, None, "auto", name, edges, heads=8, kv_heads=2)
            exact = exact_row(alone, row)
            found[tokens, packed, "single"] = relative_errors(alone, row, exact)
            for scheme in SCHEMES:
                choose.choose_layout.cache_clear()
                with patch.object(choose, "balanced", partial(by_documents, heavy=0.1, order=1)):
                    context = make_attention_context(
                        tokens, torch.distributed.group.WORLD, scheme, name, edges, heads=8, kv_heads=2
                    )
                assert context.exchanges
                found[tokens, packed, scheme] = relative_errors(context, row, exact)
    return found


@marked(two_gpus)
@pytest.mark.parametrize("lengths", [(4099, 32768), pytest.param((131072,), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAST)
def test_schemes_are_as_exact_as_their_kernel(name, lengths):
    """Error against float32 at most 1.1 times the kernel's own; flash-attn 3 rounds each call's dk and dv once more."""
    found = run_ranks(scheme_errors, 2, name, lengths, "bfloat16", device="cuda", timeout=300)[0]
    ratios = {
        (*key, part): error / found[*key[:2], "single"][part]
        for key, errors in found.items()
        for part, error in errors.items()
    }
    print(name, *(f"{key}: {ratio:.3f}" for key, ratio in ratios.items()), sep="\n")
    limit = {key: 1.3 if name == "flash3" and key[3] in ("dk", "dv") and key[2] != "ulysses" else 1.1 for key in ratios}
    assert {key: ratio for key, ratio in ratios.items() if ratio > limit[key]} == {}
    assert max(ratio for key, ratio in ratios.items() if key[2] == "ulysses" and not key[1]) <= 1.0 + 1e-6


@marked(two_gpus)
def test_schemes_in_float32():
    found = run_ranks(scheme_errors, 2, "efficient", (4099,), "float32", device="cuda", timeout=300)[0]
    assert max(max(errors.values()) for errors in found.values()) <= 1e-5


def leak(rank, world, name, masked):
    """For every scheme: whether document B's output is the same to the last bit after document A has changed."""
    same = {}
    for scheme in SCHEMES:
        context = make_attention_context(
            3000, torch.distributed.group.WORLD, scheme, name, (0, 1100, 3000) if masked else None, heads=8, kv_heads=2
        )
        outs = []
        for change in (0.0, 1.0):
            q, k, v, _ = tensors(3000, 3000, 8, 2, 128, torch.bfloat16)
            for x in (q, k, v):
                x[:, :1100] += change
            outs.append(context.unshard(context.attend(*(context.shard(x) for x in (q, k, v))))[:, 1100:])
        same[scheme] = torch.equal(*outs)
    return same


@marked(two_gpus)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", FAST)
def test_documents_leak_exactly_when_they_are_meant_to(name, masked):
    found = run_ranks(leak, 2, name, masked, device="cuda", timeout=300)[0]
    assert found == dict.fromkeys(SCHEMES, masked)
