"""Intervals for what is measured: a score without one cannot be compared.

Counts (found or not) take Wilson's interval, or Clopper and Pearson's where coverage must never fall below the level.
Means and ratios over rows take a percentile bootstrap over the rows, because the tokens of one row are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


def _check_counts(correct: int, n: int, level: float) -> None:
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"An interval needs 0 <= correct <= n and n >= 1, got correct={correct}, n={n}.")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"The confidence level must lie between 0 and 1, such as 0.95, got {level}.")


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, without continuity correction).

    It stays inside [0, 1] and keeps its meaning at 0 of n and n of n, where the usual +- 2 standard errors is empty.

    Args:
        correct: Successes.
        n: Trials.
        level: Confidence, two-sided.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Counts that are no counts, or a level outside (0, 1).
    """
    _check_counts(correct, n, level)
    return _wilson(correct / n, n, level)


def wilson_of_mean(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval around a mean of partial scores in [0, 1], as wide as if each were right or wrong.

    No scores in [0, 1] of that mean spread more than right and wrong ones do, so it is never too narrow for its form.
    It serves where scores are all alike, as two equal partial ones: a bootstrap of them would claim certainty.

    Raises:
        ValueError: A mean outside [0, 1], fewer than one score, or a level outside (0, 1).
    """
    if not 0 <= mean <= 1 or n < 1:
        raise ValueError(f"An interval needs a mean from 0 to 1 and n >= 1, got mean={mean}, n={n}.")
    _check_level(level)
    return _wilson(mean, n, level)


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends are 0 and 1 exactly at the extremes; rounding must not move them.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def clopper_pearson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval for a proportion (Clopper and Pearson 1934): coverage is never below the level.

    Each end is where a binomial tail equals half of what the level leaves out, found by bisection to 1e-12.

    Args:
        correct: Successes.
        n: Trials.
        level: Confidence, two-sided.

    Raises:
        ValueError: Counts that are no counts, or a level outside (0, 1).
    """
    _check_counts(correct, n, level)
    tail = (1 - level) / 2
    low = 0.0 if correct == 0 else _bisect(lambda p: 1 - _binomial_cdf(correct - 1, n, p) < tail)
    high = 1.0 if correct == n else _bisect(lambda p: _binomial_cdf(correct, n, p) > tail)
    return low, high


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial(n, p), summed in logarithms so that large n does not underflow."""
    terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return math.fsum(math.exp(term) for term in terms)


def _bisect(below: Callable[[float], bool]) -> float:
    """The point in (0, 1) where the predicate turns from true to false."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def bootstrap_ratio(
    sums: np.ndarray, counts: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap over rows of `sum(sums) / sum(counts)`, column by column.

    Rows are drawn with replacement, whole: a token's neighbours come along. A column that fewer than two rows reach
    says nothing about spread, and gets NaN.

    Args:
        sums: (R, C) what is summed, such as nats in each of C bins of R rows.
        counts: (R, C) how many were summed.
        seed: Seed of the draws; the same seed gives the same interval.
        level: Confidence, two-sided.
        resamples: Number of draws.

    Returns:
        (C,) lower ends and (C,) upper ends.

    Raises:
        ValueError: Shapes that differ or are not (R, C), or a level outside (0, 1).
    """
    _check_level(level)
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if sums.ndim != 2 or sums.shape != counts.shape or not len(sums):
        raise ValueError(
            f"bootstrap_ratio() needs two (rows, columns) arrays alike, got {sums.shape} and {counts.shape}."
        )
    rows = len(sums)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (S, R)
    total = draws @ counts  # (S, C)
    ratio = np.divide(draws @ sums, total, out=np.full_like(total, np.nan), where=total > 0)
    ends = np.full((2, sums.shape[1]), np.nan)
    known = (counts > 0).sum(0) >= 2
    ends[:, known] = np.nanquantile(ratio[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends[0], ends[1]


def bootstrap_mean(
    values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap of a mean. See `bootstrap_ratio` for the arguments; fewer than two values give NaN."""
    column = np.asarray(values, float).reshape(-1, 1)
    low, high = bootstrap_ratio(column, np.ones_like(column), seed=seed, level=level, resamples=resamples)
    return float(low[0]), float(high[0])


@dataclass(frozen=True)
class Difference:
    """A paired difference: `mean` of second minus first over `n` pairs, with the interval `low` to `high`."""

    mean: float
    low: float
    high: float
    n: int


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Difference:
    """Mean of `second - first` over the same samples, with a bootstrap interval over the pairs.

    Pairing takes out how hard each sample is, so that two models can be told apart with far fewer samples.

    Args:
        first: Scores of the first model, one a sample.
        second: Scores of the second model on the same samples, in the same order.
        seed: Seed of the draws.
        level: Confidence, two-sided.
        resamples: Number of draws.

    Raises:
        ValueError: Different numbers of scores, or none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"A paired difference needs the same samples on both sides, got {len(first)} and {len(second)}."
        )
    differences = np.asarray(second, float) - np.asarray(first, float)
    low, high = bootstrap_mean(differences, seed=seed, level=level, resamples=resamples)
    return Difference(float(differences.mean()), low, high, len(differences))


def alike_difference(difference: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """An interval for a mean difference of scores in [0, 1] where all pairs differ alike, by nothing for example.

    A bootstrap of them would claim certainty. Wilson's upper end for 0 of n is the largest share of pairs that may
    differ otherwise; each of those is at worst -1 or 1.

    Args:
        difference: What each pair differs by, from -1 to 1.
        n: Pairs.
        level: Confidence, two-sided.

    Raises:
        ValueError: A difference beyond -1 to 1, no pairs, or a level outside (0, 1).
    """
    if not -1 <= difference <= 1:
        raise ValueError(f"A difference of scores in [0, 1] lies between -1 and 1, got {difference}.")
    other = wilson(0, n, level)[1]
    return max(-1.0, difference * (1 - other) - other), min(1.0, difference * (1 - other) + other)


def crossed_difference(
    differences: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Difference:
    """Mean of paired differences over training seeds and samples, with a bootstrap interval over both.

    Every seed's model answers the same samples, so seeds and samples are crossed factors and are drawn with
    replacement independently of each other (the pigeonhole bootstrap: McCullagh 2000, Owen 2007). Seeds are few, and
    drawing from few understates their spread: what they differ by is widened by sqrt(S / (S - 1)) and by Student's
    quantile over the normal one. In 600 simulations each
    (normal effects, 40 samples, five mixes of spreads) 95% intervals held the true mean in 95.0% to 99.5% of cases with
    2, 3 or 5 seeds, and in 3% to 94% with one.

    Args:
        differences: (S, N) second minus first, a row a seed, a column a sample. With one seed only samples are drawn:
            the interval then says nothing of other seeds.
        seed: Seed of the draws.
        level: Confidence, two-sided.
        resamples: Number of draws.

    Raises:
        ValueError: Another shape, nothing in it, or a level outside (0, 1).
    """
    _check_level(level)
    each = np.asarray(differences, float)
    if each.ndim != 2 or not each.size:
        raise ValueError(f"crossed_difference() needs a (seeds, samples) array, got shape {each.shape}.")
    seeds, samples = each.shape
    mean = float(each.mean())
    if samples < 2:
        return Difference(mean, math.nan, math.nan, samples)
    of_seed = each.mean(1, keepdims=True)  # (S, 1)
    wider = each + (_few(seeds, level) - 1) * (of_seed - mean)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(samples, np.full(samples, 1 / samples), size=resamples)  # (B, N)
    chosen = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # (B, S)
    means = ((drawn @ wider.T) * chosen).sum(1) / (seeds * samples)  # (B,)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(mean, float(low), float(high), samples)


def _few(count: int, level: float) -> float:
    """What the spread of a few draws is widened by, so that their bootstrap has about the level's coverage."""
    if count < 2:
        return 1.0
    tail, degrees = 0.5 + level / 2, count - 1
    z = NormalDist().inv_cdf(tail)
    if degrees == 1:
        student = math.tan(math.pi * (tail - 0.5))
    elif degrees == 2:
        student = (2 * tail - 1) * math.sqrt(2 / (4 * tail * (1 - tail)))
    else:  # Abramowitz and Stegun 26.7.5
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        student = z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
    return math.sqrt(count / degrees) * student / z
