"""Intervals against tables, definitions and repeated draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.evaluation.measures.intervals import (
    alike_difference,
    bootstrap_mean,
    bootstrap_ratio,
    clopper_pearson,
    paired_difference,
    wilson,
    wilson_of_mean,
)
from ultralong.evaluation.measures.score import _mean


def test_wilson_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_clopper_pearson_against_published_values():
    # Newcombe (1998), table I, method 5.
    for correct, n, low, high in (
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ):
        assert clopper_pearson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_count_intervals_hold_the_share_and_mirror(counts, level):
    correct, n = counts
    for interval in (wilson, clopper_pearson):
        low, high = interval(correct, n, level)
        assert 0.0 <= low <= correct / n <= high <= 1.0
        mirrored = interval(n - correct, n, level)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_equal_partial_scores_claim_no_certainty():
    for correct, n in ((0, 2), (1, 2), (7, 25), (25, 25)):
        assert wilson_of_mean(correct / n, n) == pytest.approx(wilson(correct, n), abs=1e-12)
    value, n, low, high = _mean([0.5, 0.5], 0, 0.95)
    assert (value, n) == (50.0, 2)
    assert (low, high) == pytest.approx([100 * end for end in wilson(1, 2)])
    for mean, n in ((1.2, 2), (-0.1, 2), (0.5, 0)):
        with pytest.raises(ValueError, match="got"):
            wilson_of_mean(mean, n)


def test_clopper_pearson_ends_are_binomial_tails():
    low, high = clopper_pearson(7, 25, 0.9)

    def tail(p, values):
        return sum(math.comb(25, k) * p**k * (1 - p) ** (25 - k) for k in values)

    assert tail(low, range(7, 26)) == pytest.approx(0.05, abs=1e-9)
    assert tail(high, range(8)) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize(("correct", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (0, 0, 0.95), (1, 2, 95)])
def test_counts_that_are_no_counts_are_refused(correct, n, level):
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match=r"got"):
            interval(correct, n, level)


def test_bootstrap_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_mean(draw.normal(1.0, 2.0, size=40), seed=trial, level=0.9, resamples=400)
        hits += low <= 1.0 <= high
    # 0.9 of 300 is 270 with a standard deviation of 5.2; percentile intervals of 40 values run a little short.
    assert 250 <= hits <= 286


def test_bootstrap_weighs_tokens_and_draws_whole_rows():
    sums, counts = np.array([[2.0], [30.0], [4.0]]), np.array([[1.0], [10.0], [4.0]])
    low, high = bootstrap_ratio(sums, counts, seed=1, level=0.999, resamples=4000)
    # Ends of a wide interval are the samples made of one row only.
    assert (low[0], high[0]) == pytest.approx((1.0, 3.0))
    again = bootstrap_ratio(sums, counts, seed=1, level=0.999, resamples=4000)
    assert (again[0] == low).all()
    assert (again[1] == high).all()


def test_bootstrap_says_nothing_from_one_row():
    low, high = bootstrap_ratio(np.array([[1.0, 2.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]]), seed=0)
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert not np.isnan(low[1])
    with pytest.raises(ValueError, match="arrays alike"):
        bootstrap_ratio(np.zeros(3), np.zeros(3), seed=0)


def test_pairing_finds_a_small_steady_difference():
    draw = np.random.default_rng(0)
    hard = draw.normal(0.0, 5.0, size=60)
    difference = paired_difference(hard, hard + 0.2 + draw.normal(0, 0.1, size=60), seed=0)
    assert difference.n == 60
    assert 0.1 < difference.low < difference.mean < difference.high < 0.3
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([1.0], [1.0, 2.0], seed=0)


@pytest.mark.parametrize(("difference", "n", "low", "high"), [
    (0.0, 2, -0.658, 0.658), (0.0, 20, -0.161, 0.161), (1.0, 20, 0.678, 1.0), (-1.0, 20, -1.0, -0.678),
    (0.5, 20, 0.258, 0.581),
])  # fmt: skip
def test_pairs_that_differ_alike_claim_no_certainty(difference, n, low, high):
    assert alike_difference(difference, n) == pytest.approx((low, high), abs=1e-3)


def test_what_differs_alike_beyond_a_score_is_refused():
    with pytest.raises(ValueError, match="between -1 and 1"):
        alike_difference(50.0, 3)
