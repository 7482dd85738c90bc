"""The tiled loss against torch's cross entropy in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ultralong.training.loss import LanguageModelLoss, tiled_cross_entropy, tiled_token_losses


def example(tokens: int, size: int, vocabulary: int, seed: int, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=draw, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, generator=draw, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.3] = -100
    return hidden, weight, labels


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), tile=st.integers(1, 50), factor=st.floats(0.1, 10), seed=st.integers(0, 10**6))
def test_sum_and_both_gradients_equal_torch(tokens, tile, factor, seed):
    hidden, weight, labels = example(tokens, 8, 17, seed)
    total, losses = tiled_cross_entropy(hidden, weight, labels, tile)
    expected = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    # A factor put on the loss afterwards has to reach both gradients.
    ours = torch.autograd.grad(total * factor, (hidden, weight))
    theirs = torch.autograd.grad(expected.sum() * factor, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_no_target_gives_zero_with_a_graph():
    hidden, weight, labels = example(9, 8, 17, 0)
    total, losses = tiled_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    total.backward()
    assert total.item() == 0
    assert not any(tensor.any() for tensor in (losses, hidden.grad, weight.grad))


def test_head_gradient_of_a_real_vocabulary_is_summed_in_float32():
    hidden, weight, labels = example(256, 64, 128_256, 1, torch.float32)
    hidden = (0.05 * hidden.detach()).to(torch.bfloat16)  # small scores, whose rounding is not what is tested here
    half = weight.detach().to(torch.bfloat16).requires_grad_()
    total, _ = tiled_cross_entropy(hidden, half, labels, tile=2)
    total.backward()
    exact = half.detach().double().requires_grad_()
    scores = hidden.double() @ exact.T
    functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum").backward()
    error = (half.grad.double() - exact.grad).norm() / exact.grad.norm()
    # One rounding to bfloat16 is a relative error of up to 2^-9; about ninety tiles summed in it would make many.
    assert error < 2**-8, f"relative error {error:.1e}"


class Products(TorchDispatchMode):
    """Notes the sizes of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten.mm:
            self.sizes += [tuple(x.shape) for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("vocabulary", "width"), [(16, 16), (17, 24), (23, 24), (22, 24)])
def test_products_with_the_head_have_rows_that_fast_kernels_can_read(vocabulary, width):
    """Rows of a multiple of 16 bytes in two-byte types: a GPU's products run on a slow kernel otherwise."""
    hidden, weight, labels = example(21, 8, vocabulary, 3, torch.bfloat16)
    for loss in (lambda: tiled_cross_entropy(hidden, weight, labels, 5)[0],
                 lambda: tiled_token_losses(hidden, weight, labels, 5).sum()):  # fmt: skip
        with Products() as products:
            hidden.grad = weight.grad = None
            loss().backward()
        assert {max(size) for size in products.sizes if max(size) > 8} == {width}
        assert weight.grad.shape == (vocabulary, 8)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        functional.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum").backward()
        for found, expected in zip((hidden, weight), exact, strict=True):
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=2e-2, atol=5e-2)


def test_equals_the_loss_of_transformers(tiny_model):
    ids = torch.randint(0, tiny_model.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = tiny_model(input_ids=ids, labels=ids).loss
    labels = functional.pad(ids[:, 1:], (0, 1), value=-100)
    total, losses = LanguageModelLoss(tiny_model, tile=7)(ids, labels)
    torch.testing.assert_close(total / 64, expected, rtol=1e-5, atol=1e-6)
    assert losses.shape == ids.shape
    assert not losses[:, -1].any()


def test_refuses_what_it_would_compute_wrongly(tiny_model):
    with pytest.raises(ValueError, match="labels must be"):
        tiled_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"hidden must be \(N, d\)"):
        tiled_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 3), torch.zeros(3, dtype=torch.long))
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30"):
        LanguageModelLoss(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_tokens_loss_has_torchs_gradients(dtype):
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 12, generator=generator).to(dtype).requires_grad_() for n in (23, 31))
    labels = torch.randint(0, 31, (23,), generator=generator).masked_fill(torch.arange(23) % 5 == 0, -100)
    factors = torch.randn(23, generator=generator)
    plain = functional.cross_entropy((hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)), labels,
                                     reduction="none")  # fmt: skip
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight))
    ours = tiled_token_losses(hidden, weight, labels, 7)
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2e-2, 5e-2)
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol)
    for found, grad in zip(torch.autograd.grad((ours * factors).sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=rtol, atol=atol)
    only = tiled_token_losses(hidden, weight.detach(), labels, 7)
    torch.testing.assert_close(
        torch.autograd.grad((only * factors).sum(), hidden)[0], expected[0], rtol=rtol, atol=atol
    )
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        tiled_token_losses(hidden, weight, labels[:4])
