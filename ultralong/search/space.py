"""Which scalings are tried: a grid of the known methods, and factor lists for each pair that evolve (LongRoPE2).

R/2 pairs of a head, S new window over the window of pretraining. After LongRoPE2 (arXiv 2502.20082) and its code: pairs
from the critical one on are slowed down by S to 2 S, never less than the pair before; the pairs before it follow an
NTK-like curve from 1 to the critical pair's factor. Theory puts the critical pair where a turn is as long as the window
of pretraining; the paper finds it earlier, so a few before it are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ultralong.checkpoints.rescale import Extension, choose_scaling
from ultralong.rope import RopeScaling, from_config
from ultralong.rope.explain import explain_scaling
from ultralong.search.settings import SearchSettings

EARLIER = 3  # critical pairs before theory's that are tried
CHANGED = 0.3  # share of the factors that a mutation draws again (LongRoPE's)
MOVED = 0.2  # share of the mutations that move the critical pair
GRID = 100  # steps of a factor between S and 2 S


@dataclass(frozen=True)
class Genome:
    """A list of factors that can evolve.

    Attributes:
        upper: Factors of the pairs from the critical one on, never falling, between S and 2 S.
        pairs: R/2.
        temperature: Whether cosine and sine are multiplied by the method's own attention factor.
    """

    upper: tuple[float, ...]
    pairs: int
    temperature: bool

    @property
    def critical(self) -> int:
        """The first pair of `upper`."""
        return self.pairs - len(self.upper)

    def factors(self) -> tuple[float, ...]:
        """What each pair's speed is divided by, (R/2,)."""
        before = [self.upper[0] ** (index / self.critical) for index in range(self.critical)]
        return tuple(float(np.round(x, 6)) for x in (*before, *self.upper))


def grid(config: Any, wanted: SearchSettings) -> list[RopeScaling]:
    """The scalings of known methods.

    Args:
        config: The model's.
        wanted: What to try.

    Raises:
        ValueError: As for `choose_scaling`.
    """
    wishes: list[Extension] = []
    ratio = stretch(config, wanted.to)
    for method in (name for name in wanted.methods if name != "longrope"):
        for times in wanted.factors:
            base = Extension(wanted.to, method, factor=ratio * times)
            if method == "yarn":
                wishes += [
                    replace(base, beta=beta, attention_factor=None if kind == "own" else 1.0)
                    for beta in wanted.betas
                    for kind in wanted.temperatures
                ]
            elif method == "llama3":
                wishes += [replace(base, beta=beta) for beta in wanted.betas]
            else:
                wishes.append(base)
    wishes += [Extension(wanted.to, "default", theta=theta) for theta in wanted.bases]
    return [choose_scaling(config, wish) for wish in wishes]


def stretch(config: Any, to: int) -> float:
    """S, the new window over the window of pretraining.

    Raises:
        ValueError: The config does not tell the window of pretraining.
    """
    window = from_config(config).original_window
    if window is None:
        raise ValueError(
            "the model's linear scaling doesn't record the window of its pretraining: search from its base."
        )
    return to / window


def scaling_of(genome: Genome, config: Any, to: int) -> RopeScaling:
    """The longrope scaling of a genome; texts up to the window of pretraining keep the unscaled table."""
    return choose_scaling(
        config,
        Extension(
            to,
            "longrope",
            attention_factor=None if genome.temperature else 1.0,
            short_factors=(1.0,) * genome.pairs,
            long_factors=genome.factors(),
        ),
    )


def first_generation(config: Any, wanted: SearchSettings) -> list[Genome]:
    """Curves from several critical pairs, flat and rising, and mutations of them."""
    ratio, old = stretch(config, wanted.to), from_config(config)
    pairs = old.rotary_dim // 2
    theory = explain_scaling(old, choose_scaling(config, Extension(wanted.to, "linear")), wanted.to).critical_pair
    last = pairs - 1 if theory is None else theory
    criticals = [last - k for k in range(EARLIER + 1)] if wanted.critical is None else [wanted.critical]
    if not all(0 < critical < pairs for critical in criticals[:1]):
        raise ValueError(f"critical must be a pair from 1 to {pairs - 1}, found {criticals[0]}.")
    found: list[Genome] = []
    for critical in (critical for critical in criticals if critical > 0):
        flat = (ratio,) * (pairs - critical)
        rising = tuple(min(2 * ratio, ratio ** (index / critical)) for index in range(critical, pairs))
        for temperature in wanted.temperatures:
            found += [Genome(upper, pairs, temperature == "own") for upper in (flat, rising)]
    found = list(dict.fromkeys(found))
    for number in range(max(0, wanted.population - len(found))):
        draw = np.random.default_rng((wanted.seed, 0, number))
        found.append(mutate(found[number % len(found)], draw, ratio, wanted.critical is None))
    return found[: wanted.population]


def children(best: Sequence[Genome], generation: int, wanted: SearchSettings, ratio: float) -> list[Genome]:
    """A generation from its parents: half of it mutations, half crossings; the same from the same parents.

    Args:
        best: The parents, best first.
        generation: Its number, from 1.
        wanted: Seed and size.
        ratio: S.
    """
    found = []
    for number in range(wanted.population):
        draw = np.random.default_rng((wanted.seed, generation, number))
        one, other = (best[int(place)] for place in draw.integers(0, len(best), 2))
        child = cross(one, other, draw, ratio) if number % 2 and one != other else one
        if child in best:
            child = mutate(child, draw, ratio, wanted.critical is None)
        found.append(child)
    return found


def mutate(genome: Genome, draw: np.random.Generator, ratio: float, move: bool) -> Genome:
    """Some factors drawn again between their neighbours', and now and then the critical pair moved by one."""
    upper = list(genome.upper)
    if move and draw.random() < MOVED:
        if draw.random() < 0.5 and genome.critical > 1:
            upper.insert(0, ratio)
        elif len(upper) > 1:
            upper.pop(0)
    chosen = draw.random(len(upper)) < CHANGED
    chosen[draw.integers(len(upper))] = True
    for place in np.flatnonzero(chosen):
        low = upper[place - 1] if place else ratio
        high = upper[place + 1] if place + 1 < len(upper) else 2 * ratio
        upper[place] = low + (high - low) * int(draw.integers(0, GRID + 1)) / GRID
    return replace(genome, upper=tuple(float(np.round(x, 6)) for x in upper))


def cross(one: Genome, other: Genome, draw: np.random.Generator, ratio: float) -> Genome:
    """Each factor of either parent, from the first one's critical pair on, put in order again."""
    ours, theirs = one.factors(), other.factors()
    mixed = [ours[i] if draw.random() < 0.5 else theirs[i] for i in range(one.critical, one.pairs)]
    return replace(one, upper=tuple(sorted(min(2 * ratio, max(ratio, x)) for x in mixed)))
