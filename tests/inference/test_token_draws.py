"""How a token is drawn: by float64's probabilities, and at the ends of what may be asked for."""

from __future__ import annotations

import math

import pytest
import torch

from ultralong.inference.decoding import Sampler, Sampling

LOGITS = torch.tensor([31.0, 29.5, 30.5, -4.0, 30.9, 28.0, 30.0, 27.0])
DRAWS = 20_000


def wanted(temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities (V,), from the most likely token on until they reach top_p."""
    probabilities = (LOGITS.double() / temperature).softmax(-1)
    total = 0.0
    kept = torch.zeros_like(probabilities)
    for token in probabilities.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (0.7, 0.95), (1.0, 0.5)])
def test_tokens_are_drawn_with_their_probability(temperature, top_p):
    drawn = Sampler(Sampling(temperature, top_p, 0))(LOGITS.expand(DRAWS, -1))
    expected = DRAWS * wanted(temperature, top_p)
    found = drawn.bincount(minlength=len(LOGITS)).double()
    assert not found[expected == 0].any(), "a token outside of top_p was drawn"
    usual = expected > 5
    chi_square = float(((found - expected)[usual] ** 2 / expected[usual]).sum())
    degrees = int(usual.sum()) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1e-7, 1.0), (1e-40, 1.0), (1e-300, 1.0), (2.0, 1e-300), (1, 1e-45)]
)
def test_the_smallest_temperature_and_top_p_take_the_best_token(temperature, top_p, size):
    """They were infinite or no number in float32: an error, with which a server of several GPUs ended."""
    assert Sampler(Sampling(temperature, top_p, 0))(size * LOGITS[None]).tolist() == [0]
