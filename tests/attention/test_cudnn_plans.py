"""cuDNN's kernel on packed rows: few shapes and strides, for each of which torch makes a plan, and exact results."""

import pytest
import torch

from ultralong.attention.kernels import attention_forward, torch_cuda
from ultralong.attention.kernels.backward import attention_backward
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.spec import AttentionSpec, VarlenSegments

HEADS, KV_HEADS, SIZE = 4, 2, 8


class Plans:
    """torch's operators, by the reference; remembers by what a plan would be looked up."""

    def __init__(self):
        self.forward, self.backward = set(), set()

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, lse, dropout, causal, debug, *, scale):
        self.forward.add((causal, *((x.shape, x.stride()) for x in (q, k, v))))
        out, lse = Reference().forward(*(x.transpose(1, 2) for x in (q, k, v)), AttentionSpec(scale, causal))
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def _scaled_dot_product_cudnn_attention_backward(self, dout, q, k, v, out, lse, *rest, scale):
        causal, tensors = rest[-1], (dout, q, k, v, out)
        self.backward.add((causal, *((x.shape, x.stride()) for x in tensors)))
        assert rest[5:7] == (q.shape[2], k.shape[2])
        assert lse.isfinite().all()
        grads = Reference().backward(
            *(x.transpose(1, 2) for x in tensors), lse.squeeze(-1), AttentionSpec(scale, causal)
        )
        return tuple(x.transpose(1, 2) for x in grads)


@pytest.fixture
def plans(monkeypatch):
    made = Plans()
    monkeypatch.setattr(torch_cuda, "_aten", made)
    monkeypatch.setattr(torch_cuda, "_require", lambda *_: None)

    def tried(kernel):  # while it is made, as on a GPU; a call that is not causal is none of the planned ones
        kernel.forward(*row(16, 0)[:3], AttentionSpec(0.4, causal=False))
        made.forward.clear()
        return True

    monkeypatch.setattr(torch_cuda, "_agrees", tried)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return made


def row(tokens, seed):
    torch.manual_seed(seed)
    shapes = [(1, tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def lengths(seed, tokens, shortest=40, longest=700):
    """Documents of a row, their lengths even by the logarithm."""
    torch.manual_seed(seed)
    found = []
    while sum(found) < tokens:
        found.append(int(shortest * (longest / shortest) ** torch.rand(()).item()))
    found[-1] -= sum(found) - tokens
    return [length for length in found if length > 1]


def both_passes(kernel, edges, seed):
    q, k, v, dout = row(edges[-1], seed)
    spec = AttentionSpec(0.4).with_segments(VarlenSegments(edges, edges))
    out, lse = attention_forward(kernel, q, k, v, spec)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    wanted, wanted_lse = attention_forward(Reference(), q, k, v, spec)
    right = attention_backward(Reference(), dout, q, k, v, wanted, wanted_lse, spec)
    return zip((out, lse, *grads), (wanted, wanted_lse, *right), strict=True)


def test_rows_of_ever_new_lengths_need_few_plans_and_are_exact(plans, monkeypatch):
    monkeypatch.setattr(torch_cuda, "PLANS", 8)
    monkeypatch.setattr(torch_cuda, "TILE", 16)
    kernel, seen = torch_cuda.TorchCudnn(), set()
    for number in range(12):
        documents = lengths(number, 3000)
        seen |= {*documents}
        edges = tuple(torch.tensor([0, *documents]).cumsum(0).tolist())
        for found, right in both_passes(kernel, edges, number):
            assert found.shape == right.shape
            assert (found - right).abs().max() <= 1e-12 * right.abs().max()
    # From 16 to 512 there are 32 multiples of 16; of 512 to 1024 again 32.
    assert len(seen) > 100
    for made in (plans.forward, plans.backward):
        assert 8 < len(made) <= 8 + 64 < 0.75 * len(seen)


def test_the_first_lengths_have_plans_of_their_own_and_keep_them(plans, monkeypatch):
    monkeypatch.setattr(torch_cuda, "PLANS", 3)
    kernel = torch_cuda.TorchCudnn()
    for _ in range(2):
        list(both_passes(kernel, (0, 100, 301, 502, 1003), 0))  # 201 twice, and three lengths in all
    assert {shapes[1][0][2] for shapes in plans.forward} == {100, 201, 501}
    list(both_passes(kernel, (0, 101, 301), 0))
    assert {shapes[1][0][2] for shapes in plans.forward} == {100, 201, 501, 128, 256}


def test_a_document_has_one_plan_whatever_row_it_is_in(plans):
    kernel = torch_cuda.TorchCudnn()
    for edges in ((0, 100, 300), (0, 100, 300, 1000), (0, 200, 300, 1400), (0, 100)):
        list(both_passes(kernel, edges, 1))
    of_documents = [shapes for shapes in plans.forward if shapes[1][0][2] <= 200]
    assert len(of_documents) == 2
    assert len([shapes for shapes in plans.backward if shapes[1][0][2] <= 200]) == 2


@pytest.mark.parametrize(("queries", "keys", "causal"), [(300, 300, False), (100, 300, False)])
def test_calls_whose_padding_would_be_seen_have_none(plans, monkeypatch, queries, keys, causal):
    monkeypatch.setattr(torch_cuda, "PLANS", 0)
    q, k, v, dout = row(300, 0)
    kernel, spec = torch_cuda.TorchCudnn(), AttentionSpec(0.4, causal)
    out, lse = kernel.forward(q[:, :queries], k[:, :keys], v[:, :keys], spec)
    kernel.backward(dout[:, :queries], q[:, :queries], k[:, :keys], v[:, :keys], out, lse, spec)
    assert [shapes[1][0][2] for shapes in plans.forward] == [queries]
    assert [shapes[2][0][2] for shapes in plans.backward] == [queries]


def test_long_calls_are_not_padded(plans, monkeypatch):
    monkeypatch.setattr(torch_cuda, "PLANS", 0)
    kernel, spec = torch_cuda.TorchCudnn(), AttentionSpec(0.4)
    longest = torch_cuda.PADDED // 32

    def padding(tokens, batch=1):
        q, k = (torch.empty(1, 1, 1, 1).expand(batch, tokens, heads, 128) for heads in (32, 8))
        return kernel._padding(q, k, spec)

    assert [padding(longest + 1), padding(131_000)] == [0, 0]
    assert padding(longest - 1) == 1
    assert padding(9_000) == 9_216 - 9_000, "a step of 256 from 8,192 to 16,384"
    assert padding(3_000) == 3_072 - 3_000, "a block of 128 below"
    for tokens in range(200, longest, 517):
        assert padding(tokens) < max(torch_cuda.TILE, tokens / torch_cuda.STEPS)
    assert padding(4_096) == 0
    # Of a batch all rows are copied: 2 GiB of rows of 129 tokens, which a kernel's index just holds, would be four.
    assert [padding(9_000, 2), padding(129, 4_064)] == [0, 0]
    assert padding(129, 64) == 256 - 129
