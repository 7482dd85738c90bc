"""Every kernel of this machine against attention written out, with gradients; what makes up for missing features."""

import re
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from attention_yardstick import plain_attention, random_qkv, relative, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from ultralong.attention.kernels import (
    KERNELS,
    WINDOW,
    attention_backward,
    attention_forward,
    available_kernels,
    choose_kernel,
    get_kernel,
)
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.lse_merge import add_sink, merge, merge_into, sink_gradient
from ultralong.attention.spec import AttentionSpec, VarlenSegments

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Bare(Reference):
    """A kernel that has no feature at all and a small index, and fails when it is asked for more."""

    name = "bare"
    features = frozenset()
    max_elements = 200

    def _check(self, q, k, spec):
        assert spec.segments is None
        assert q.shape[2] == k.shape[2]
        assert not spec.causal or q.shape[1] == k.shape[1]
        assert q.shape[2] == 1 or q.numel() <= self.max_elements

    def forward(self, q, k, v, spec):
        self._check(q, k, spec)
        return super().forward(q, k, v, spec)

    def backward(self, dout, q, k, v, out, lse, spec):
        self._check(q, k, spec)
        return super().backward(dout, q, k, v, out, lse, spec)


def cpu_kernels():
    return [*available_kernels("cpu").values(), Bare()]


def assert_as_written_out(kernel, q, k, v, dout, spec, seen, tolerance):
    out, lse = attention_forward(kernel, q, k, v, spec)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    exact = [x.double().clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = plain_attention(*exact, seen, scale=spec.scale, softcap=spec.softcap)
    expected.backward(dout.double())
    names = ("out", "lse", "dq", "dk", "dv")
    for name, found, wanted in zip(names, (out, lse, *grads), (expected, expected_lse, *(x.grad for x in exact))):
        assert found.shape == wanted.shape, name
        assert relative(found.double(), wanted.detach()) <= tolerance, (name, kernel)


@st.composite
def calls(draw):
    """Heads, lengths and pieces of one call."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    pieces = draw(st.lists(st.tuples(st.integers(1, 17), st.integers(0, 9)), min_size=1, max_size=5))
    edges_q, edges_k = [0], [0]
    for queries, before in pieces:
        edges_q.append(edges_q[-1] + queries)
        edges_k.append(edges_k[-1] + queries + before)
    return draw(st.integers(0, 2**20)), draw(st.sampled_from([1, 2])), heads, kv_heads, tuple(edges_q), tuple(edges_k)


@pytest.mark.parametrize("kernel", cpu_kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25)
@given(call=calls(), causal=st.booleans())
def test_a_kernel_equals_attention_written_out(kernel, dtype, call, causal):
    seed, batch, heads, kv_heads, edges_q, edges_k = call
    q, k, v, dout = random_qkv(seed, batch, edges_q[-1], edges_k[-1], heads, kv_heads, 8, dtype)
    seen = visible(edges_q[-1], edges_k[-1], causal=causal, edges_q=edges_q, edges_k=edges_k)
    spec = AttentionSpec(scale=0.4, causal=causal).with_segments(VarlenSegments(edges_q, edges_k))
    assert_as_written_out(kernel, q, k, v, dout, spec, seen, TOLERANCE[dtype])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 40),
    before=st.integers(0, 20),
    window=st.one_of(st.none(), st.integers(1, 30)),
    softcap=st.one_of(st.none(), st.floats(0.5, 5)),
)
def test_windows_and_soft_caps(seed, tokens, before, window, softcap):
    q, k, v, dout = random_qkv(seed, 1, tokens, tokens + before, 4, 2, 8)
    seen = visible(tokens, tokens + before, window=window)
    spec = AttentionSpec(scale=1.0, window=window, softcap=softcap)
    assert_as_written_out(Reference(), q, k, v, dout, spec, seen, 1e-12)


def test_the_reference_works_in_tiles(monkeypatch):
    monkeypatch.setattr("ultralong.attention.kernels.reference.SCORES_AT_ONCE", 4 * 50 * 7)
    q, k, v, dout = random_qkv(0, 1, 33, 50, 4, 2, 8)
    assert_as_written_out(
        Reference(), q, k, v, dout, AttentionSpec(scale=0.3, window=20), visible(33, 50, window=20), 1e-12
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(1, 39), max_size=6, unique=True))
def test_parts_join_to_the_whole_and_each_backward_is_its_share(seed, cuts):
    q, k, v, dout = random_qkv(seed, 2, 11, 40, 4, 2, 8)
    spec, kernel = AttentionSpec(scale=0.3, causal=False), get_kernel("flash", "cpu")
    out, lse = torch.zeros_like(q), q.new_full((2, 4, 11), float("-inf"))
    edges = [0, *sorted(cuts), 40]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    for part in parts:
        merge_into(out, lse, *attention_forward(kernel, q, k[:, part], v[:, part], spec))
    whole, whole_lse = attention_forward(kernel, q, k, v, spec)
    assert relative(out, whole) <= 1e-12
    assert relative(lse, whole_lse) <= 1e-12
    shares = [attention_backward(kernel, dout, q, k[:, part], v[:, part], out, lse, spec) for part in parts]
    dq, dk, dv = attention_backward(kernel, dout, q, k, v, whole, whole_lse, spec)
    assert relative(sum(share[0] for share in shares), dq) <= 1e-12
    assert relative(torch.cat([share[1] for share in shares], 1), dk) <= 1e-12
    assert relative(torch.cat([share[2] for share in shares], 1), dv) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_tensor_of_two_parts_is_rounded_once(dtype):
    """As when they are joined in float32 in place and rounded afterwards; float64 says what is right."""
    out, part, *_ = (x.to(dtype) for x in random_qkv(0, 2, 17, 17, 4, 4, 8))
    first, part_lse = torch.randn(2, 2, 4, 17, generator=torch.Generator().manual_seed(1))
    wide, exact, lse, new_lse = out.float().clone(), out.double(), first.clone(), first.clone()
    merge_into(wide, lse, part, part_lse)
    merge_into(exact, first.double(), part, part_lse.double())
    found = merge(out, new_lse, part, part_lse)
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))
    assert torch.equal(new_lse, lse)
    assert relative(found.double(), exact) <= torch.finfo(dtype).eps


def test_joining_survives_scores_that_overflow_exp():
    out, lse = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), float("-inf"))
    merge_into(out, lse, torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 3000.0))
    merge_into(out, lse, torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -3000.0))
    assert torch.equal(out, torch.ones(1, 1, 1, 2))
    assert lse.item() == 3000.0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 40),
    before=st.integers(0, 30),
    window=st.integers(1, 35),
    causal=st.booleans(),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_a_kernel_without_windows_computes_them_in_squares(tokens, before, window, causal, batch, seed):
    kernel = get_kernel("flash", "cpu")
    assert WINDOW not in kernel.features
    q, k, v, dout = random_qkv(seed, batch, tokens, tokens + before, 4, 2, 8)
    spec = AttentionSpec(scale=0.3, causal=causal, window=window)
    seen = visible(tokens, tokens + before, causal=causal, window=window)
    assert_as_written_out(kernel, q, k, v, dout, spec, seen, 1e-12)


def test_a_sink_and_its_gradient():
    q, k, v, dout = random_qkv(3, 2, 20, 20, 4, 2, 8)
    sink = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = plain_attention(*exact, visible(20, 20), scale=0.3, sink=sink)
    expected.backward(dout)
    kernel, spec = get_kernel("flash", "cpu"), AttentionSpec(scale=0.3)
    out, lse = add_sink(*attention_forward(kernel, q, k, v, spec), sink.detach())
    grads = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    assert relative(out, expected.detach()) <= 1e-12
    assert relative(lse, expected_lse.detach()) <= 1e-12
    assert relative(sink_gradient(dout, out, lse, sink.detach()), sink.grad) <= 1e-12
    for found, leaf in zip(grads, exact):
        assert relative(found, leaf.grad) <= 1e-12


def test_auto_takes_the_fast_kernel_and_says_so_once(caplog):
    from ultralong.attention.kernels import _auto

    _auto.cache_clear()
    q = torch.zeros(1, 4, 2, 16)
    with caplog.at_level("INFO", logger="ultralong"):
        assert choose_kernel("auto", q, AttentionSpec(scale=1.0)).name == "flash"
        assert choose_kernel("auto", q, AttentionSpec(scale=1.0)).name == "flash"
    assert len([record for record in caplog.records if "attention kernel flash" in record.getMessage()]) == 1
    assert choose_kernel("auto", q, AttentionSpec(scale=1.0, window=3)).name == "flash", "cut into squares"
    assert choose_kernel("auto", q, AttentionSpec(scale=1.0, softcap=3.0)).name == "reference"


def test_what_a_named_kernel_cannot_do_is_refused():
    q = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"'flash' can't compute.*soft cap"):
        choose_kernel("flash", q, AttentionSpec(scale=1.0, softcap=2.0))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        choose_kernel("flash", q.long(), AttentionSpec(scale=1.0))
    with pytest.raises(ValueError, match=r"one of auto, flash4, .* found 'flash5'"):
        choose_kernel("flash5", q, AttentionSpec(scale=1.0))


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"flash", "reference"}))
def test_a_kernel_without_a_gpu_is_an_error_that_says_so(name):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="CUDA GPU"):
        get_kernel(name)


@pytest.mark.parametrize(
    ("name", "module"), [("flash4", "FlashAttn4"), ("flash3", "FlashAttn3"), ("flash2", "FlashAttn2")]
)
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, name, module):
    from ultralong.attention.kernels import flash_attn, flash_attn_4

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash_attn.importlib, "import_module", missing)
    monkeypatch.setattr(flash_attn_4, "kept_kernels", nullcontext)  # asks the GPU, which is not there
    with pytest.raises(ImportError, match=re.escape(flash_attn.INSTALL[name])):
        getattr(flash_attn_4 if name == "flash4" else flash_attn, module)()


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
