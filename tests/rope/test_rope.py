"""Rotary tables against transformers' own initialisers (bit for bit) and against the papers' formulas in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ultralong.rope import (
    RopeScaling,
    attention_factor,
    inverse_frequencies,
    pair_counts,
    rope_parameters,
    wavelengths,
)

HEADS, BASES, WINDOW = (64, 128), (1e4, 1e5, 5e5, 1e6), 8192


def every_scaling(head_dim: int, theta: float, factor: float) -> dict[str, RopeScaling]:
    pairs = head_dim // 2
    common = {"head_dim": head_dim, "theta": theta, "factor": factor, "original_window": WINDOW}
    return {
        "default": RopeScaling("default", head_dim, theta, original_window=WINDOW),
        "linear": RopeScaling("linear", head_dim, theta, factor),
        "ntk": RopeScaling("ntk", **common),
        "dynamic": RopeScaling("dynamic", **common),
        "yarn": RopeScaling("yarn", **common),
        "yarn, its paper's beta, no temperature": RopeScaling("yarn", **common, beta=32.0, attention_factor=1.0),
        "yarn, set temperature": RopeScaling("yarn", **common, alpha=2.0, beta=16.0, attention_factor=1.3),
        "yarn, fractional ramp ends": RopeScaling("yarn", **common, truncate=False),
        "yarn, ramp in rotations": RopeScaling("yarn", **common, ramp="rotations", attention_factor=1.0),
        "llama3": RopeScaling("llama3", **common),
        "llama3, other ramp": RopeScaling("llama3", **common, alpha=0.5, beta=20.0),
        "longrope": RopeScaling(
            "longrope",
            **common,
            short_factors=tuple(1 + 0.01 * i for i in range(pairs)),
            long_factors=tuple(1 + 0.9 * i for i in range(pairs)),
        ),
        "longrope, set attention factor": RopeScaling(
            "longrope", **common, attention_factor=1.19, short_factors=(1.0,) * pairs, long_factors=(factor,) * pairs
        ),
    }


def transformers_table(scaling: RopeScaling, length: int | None) -> tuple[torch.Tensor, float]:
    """The table that an unmodified transformers builds from the config that we write."""
    window = WINDOW if scaling.method == "dynamic" else int(WINDOW * scaling.factor)
    config = LlamaConfig(
        head_dim=scaling.head_dim, max_position_embeddings=window, rope_parameters=rope_parameters(scaling)
    )
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)


def assert_is_transformers(table: torch.Tensor, factor: float, scaling: RopeScaling, length: int | None = None) -> None:
    """The one check that every table has to pass, and that a wrong table has to fail."""
    expected, expected_factor = transformers_table(scaling, length)
    assert torch.equal(table, expected), f"largest relative error {(table / expected - 1).abs().max():.2e}"
    assert factor == expected_factor


@pytest.mark.parametrize("theta", BASES)
@pytest.mark.parametrize("head_dim", HEADS)
def test_every_method_equals_transformers_to_the_last_bit(head_dim, theta):
    for factor, length in itertools.product((2.0, 4.0, 12.2, 128.0, 512.0), (None, 1000, 100_000)):
        for scaling in every_scaling(head_dim, theta, factor).values():
            assert_is_transformers(*inverse_frequencies(scaling, length), scaling, length)


def paper_table(scaling: RopeScaling, length: int | None) -> np.ndarray:
    """The published formulas, pair by pair in float64, written without any of the library's code."""
    size, theta, factor = scaling.head_dim, scaling.theta, scaling.factor
    frequencies = []
    ends = [
        size * math.log(WINDOW / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta, scaling.alpha)
    ]
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    for pair in range(size // 2):
        plain = theta ** (-2 * pair / size)
        turns = WINDOW * plain / (2 * math.pi)
        by_rotations = min(max((turns - scaling.alpha) / (scaling.beta - scaling.alpha), 0), 1)
        by_dimension = 1 - min(max((pair - ends[0]) / (ends[1] - ends[0]), 0), 1)
        stretch = max(factor * max(length or 0, WINDOW) / WINDOW - (factor - 1), 1)
        keep = by_rotations if scaling.method == "llama3" or scaling.ramp == "rotations" else by_dimension
        frequencies.append(
            {
                "default": plain,
                "linear": plain / factor,
                "ntk": plain * factor ** (-2 * pair / (size - 2)),
                "dynamic": plain * stretch ** (-2 * pair / (size - 2)),
                "yarn": keep * plain + (1 - keep) * plain / factor,
                "llama3": keep * plain + (1 - keep) * plain / factor,
            }[scaling.method]
        )
    return np.array(frequencies)


@pytest.mark.parametrize("theta", BASES)
@pytest.mark.parametrize("head_dim", HEADS)
def test_every_formula_equals_its_paper_in_float64(head_dim, theta):
    for factor, length in itertools.product((4.0, 128.0), (None, 100_000)):
        for name, scaling in every_scaling(head_dim, theta, factor).items():
            if scaling.method != "longrope":
                table = inverse_frequencies(scaling, length, torch.float64)[0].numpy()
                np.testing.assert_allclose(table, paper_table(scaling, length), rtol=1e-12, err_msg=name)


def test_longrope_divides_by_the_list_for_the_input_length():
    scaling = every_scaling(128, 1e4, 32.0)["longrope"]
    plain = inverse_frequencies(RopeScaling("default", 128, 1e4), dtype=torch.float64)[0]
    for length, divisors in ((None, "short_factors"), (WINDOW, "short_factors"), (WINDOW + 1, "long_factors")):
        table, factor = inverse_frequencies(scaling, length, torch.float64)
        torch.testing.assert_close(
            plain / table, torch.tensor(getattr(scaling, divisors), dtype=torch.float64), rtol=1e-7, atol=0
        )
        assert factor == math.sqrt(1 + math.log(32) / math.log(WINDOW))


@pytest.mark.parametrize(("target", "factor"), [(1_048_576, 128), (2_097_152, 256), (4_194_304, 512)])
def test_the_recipe_is_the_llama3_type_with_a_larger_factor(target, factor):
    assert target / WINDOW == factor
    recipe = RopeScaling("yarn", 128, 5e5, factor, WINDOW, alpha=1.0, beta=4.0, ramp="rotations", attention_factor=1.0)
    assert rope_parameters(recipe) == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    }
    assert_is_transformers(*inverse_frequencies(recipe), recipe)
    llama3 = replace(recipe, method="llama3", ramp="dimension")
    assert torch.equal(inverse_frequencies(recipe)[0], inverse_frequencies(llama3)[0])
    assert pair_counts(recipe) == {"untouched": 29, "ramp": 6, "scaled": 29}


def wrong_way(scaling: RopeScaling) -> torch.Tensor:
    """A ramp the wrong way round: slows the fast pairs down and leaves the slow ones alone."""
    plain = inverse_frequencies(replace(scaling, method="default", attention_factor=None))[0]
    right = inverse_frequencies(scaling)[0]
    keep = (right / plain - 1 / scaling.factor) / (1 - 1 / scaling.factor)
    return keep * plain / scaling.factor + (1 - keep) * plain


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("theta", BASES)
def test_wrong_tables_fail_the_check_that_right_ones_pass(head_dim, theta):
    for name in ("llama3", "yarn", "yarn, ramp in rotations", "yarn, fractional ramp ends"):
        scaling = every_scaling(head_dim, theta, 128.0)[name]
        right, factor = inverse_frequencies(scaling)
        assert_is_transformers(right, factor, scaling)
        multiplied = inverse_frequencies(replace(scaling, factor=8.0 * scaling.factor))[0]
        other = "dimension" if scaling.method == "llama3" or scaling.ramp == "rotations" else "rotations"
        other_ramp = inverse_frequencies(replace(scaling, method="yarn", ramp=other, attention_factor=1.0))[0]
        one_bit = right.clone()
        one_bit[-1] = torch.nextafter(one_bit[-1], torch.tensor(1.0))
        for wrong in (wrong_way(scaling), multiplied, other_ramp, right.flip(0), one_bit):
            with pytest.raises(AssertionError, match="relative error"):
                assert_is_transformers(wrong, factor, scaling)


def test_how_far_the_two_ramps_are_apart():
    """transformers' yarn is not the recipe: on the six pairs of the ramp it differs by up to 83%, elsewhere not."""
    recipe = RopeScaling("llama3", 128, 5e5, 128.0, WINDOW)
    yarn = replace(recipe, method="yarn", attention_factor=1.0)
    tables = [inverse_frequencies(scaling, dtype=torch.float64)[0] for scaling in (yarn, recipe)]
    apart = (tables[0] / tables[1] - 1).abs()
    assert sorted(apart.gt(1e-9).nonzero().flatten().tolist()) == [29, 30, 31, 32, 33, 34]
    assert apart.max() == pytest.approx(0.83, abs=0.005)


def test_attention_factors():
    yarn = RopeScaling("yarn", 128, 5e5, 128.0, WINDOW)
    assert [round(attention_factor(replace(yarn, factor=s)), 4) for s in (1.0, 8.0, 128.0, 256.0, 512.0)] == [
        1.0,
        1.2079,
        1.4852,
        1.5545,
        1.6238,
    ]
    assert attention_factor(replace(yarn, attention_factor=1.0)) == 1.0
    assert attention_factor(replace(yarn, attention_factor=1.25)) == 1.25
    assert attention_factor(replace(yarn, method="llama3")) == 1.0


def test_ntk_bases_and_longest_wavelength():
    ntk = RopeScaling("ntk", 128, 5e5, 128.0)
    for factor, base in ((128.0, 6.91e7), (256.0, 1.398e8), (512.0, 2.826e8)):
        assert rope_parameters(replace(ntk, factor=factor))["rope_theta"] == pytest.approx(base, rel=1e-3)
    linear = replace(ntk, method="linear")
    slowest = [wavelengths(inverse_frequencies(s, dtype=torch.float64)[0])[-1].item() for s in (ntk, linear)]
    assert slowest[0] == pytest.approx(slowest[1], rel=1e-12)
    assert slowest[0] == pytest.approx(128 * 2.56e6, rel=1e-3)


scalings = st.builds(
    lambda method, head_dim, theta, factor, window, ramp, beta: RopeScaling(
        method, head_dim, theta, factor, window, beta=beta, ramp=ramp, attention_factor=1.0
    ),
    method=st.sampled_from(["default", "linear", "ntk", "dynamic", "yarn", "llama3"]),
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    theta=st.floats(1e3, 1e8),
    factor=st.floats(1.0, 1024.0),
    window=st.integers(64, 262_144),
    ramp=st.sampled_from(["rotations", "dimension"]),
    beta=st.floats(1.5, 64.0),
)


@settings(max_examples=200, deadline=None)
@given(scalings)
def test_tables_keep_their_order_and_stay_between_unscaled_and_fully_scaled(scaling):
    table = inverse_frequencies(scaling, length=4 * scaling.original_window, dtype=torch.float64)[0]
    plain = inverse_frequencies(replace(scaling, method="default"), dtype=torch.float64)[0]
    stretch = 3 * scaling.factor + 1 if scaling.method == "dynamic" else scaling.factor
    assert table.shape == (scaling.head_dim // 2,)
    assert bool((table.diff() < 0).all()), "pairs go from fast to slow"
    assert bool((table <= plain * (1 + 1e-9)).all())
    assert bool((table >= plain / stretch * (1 - 1e-9)).all())
    assert sum(pair_counts(scaling).values()) == scaling.head_dim // 2


@settings(max_examples=60, deadline=None)
@given(scalings)
def test_factor_one_changes_nothing(scaling):
    table = inverse_frequencies(replace(scaling, factor=1.0), dtype=torch.float64)[0]
    plain = inverse_frequencies(replace(scaling, method="default"), dtype=torch.float64)[0]
    torch.testing.assert_close(table, plain, rtol=1e-12, atol=0)
    assert pair_counts(replace(scaling, factor=1.0))["untouched"] == scaling.head_dim // 2


@settings(max_examples=60, deadline=None)
@given(theta=st.floats(1e3, 1e8), window=st.integers(1024, 262_144), factor=st.floats(1.1, 1024.0))
def test_llama3_equals_transformers_to_the_last_bit_for_any_setting(theta, window, factor):
    scaling = RopeScaling("llama3", 128, theta, factor, window)
    config = LlamaConfig(head_dim=128, max_position_embeddings=window + 1, rope_parameters=rope_parameters(scaling))
    expected = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    assert torch.equal(inverse_frequencies(scaling)[0], expected)


@pytest.mark.parametrize("name", list(every_scaling(64, 1e4, 4.0)))
def test_scores_depend_on_the_distance_only(name):
    scaling = every_scaling(64, 1e4, 4.0)[name]
    table, factor = inverse_frequencies(scaling, length=30_000, dtype=torch.float64)
    query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(at: int, distance: int) -> float:
        angles = torch.tensor([[[at], [at - distance]]], dtype=torch.float64) * torch.cat((table, table))  # (1, 2, D)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        rotated, _ = apply_rotary_pos_emb(query, query, cos[:, :1], sin[:, :1])
        _, other = apply_rotary_pos_emb(key, key, cos[:, 1:], sin[:, 1:])
        return (rotated * other).sum().item()

    for distance in (0, 1, 37, 5000):
        assert score(5000, distance) == pytest.approx(score(29_999, distance), abs=1e-8)
    assert score(10, 0) == pytest.approx((query * key).sum().item() * factor**2, rel=1e-9)
