"""What a scaling changes, pair by pair: wavelengths, turns within the old and the new window, and angles never seen.

R/2 pairs of a head. A pair's wavelength is the tokens of one full turn. In pretraining on L tokens it met the angles of
`L / wavelength` turns: all there are, from one turn on. At position T it meets those of `T / wavelength` turns of its
new wavelength. A pair that made less than one turn in L tokens, and turns further in T, meets angles that it never saw.
Which pairs those are without scaling, from the critical pair on (LongRoPE2, arXiv 2502.20082), follows from base and L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch

from ultralong.rope.frequencies import attention_factor, inverse_frequencies, wavelengths
from ultralong.rope.scaling import RopeScaling

SAME = 1e-6  # relative difference up to which a divisor is taken for 1 or for the whole factor
KINDS = {
    "kept": "kept as pretrained",
    "ramp": "slowed down by less than the factor",
    "interpolated": "slowed down by the whole factor",
    "slowed": "slowed down by more than the factor",
    "faster": "turns faster than pretrained",
}


@dataclass(frozen=True)
class Pair:
    """One rotary pair before and after.

    Attributes:
        index: Its number, the fastest is 0.
        wavelength: Tokens of a turn in pretraining, unscaled.
        source_wavelength: Tokens of a turn in the source, which may be scaled already.
        new_wavelength: Tokens of a turn in the new table, for texts as long as the new window.
        divisor: New wavelength over the unscaled one: what its speed is divided by.
        kind: A key of `KINDS`.
        turns: Turns within the window of pretraining.
        new_turns: Turns within the new window, by the new table.
        unscaled_turns: Turns within the new window without any scaling.
    """

    index: int
    wavelength: float
    source_wavelength: float
    new_wavelength: float
    divisor: float
    kind: str
    turns: float
    new_turns: float
    unscaled_turns: float

    @property
    def meets_unseen_angles(self) -> bool:
        """Whether positions of the new window turn it to angles that pretraining never did."""
        return self.turns < 1 and self.new_turns > self.turns * (1 + SAME)


@dataclass(frozen=True)
class ScalingExplanation:
    """What a scaling changes.

    Attributes:
        method: RoPE method.
        factor: Its factor.
        original_window: L, tokens of the unscaled pretraining.
        new_window: Tokens of the new window.
        theta: RoPE base of the new table, before a method changes it.
        attention_factor: What cosine and sine are multiplied by.
        pairs: One a rotary pair.
        critical_pair: The first pair that makes less than one turn within L; None where all make one.
        follows_length: Whether the table depends on the length of the text; shorter ones have another then.
    """

    method: str
    factor: float
    original_window: int
    new_window: int
    theta: float
    attention_factor: float
    pairs: tuple[Pair, ...]
    critical_pair: int | None
    follows_length: bool

    @property
    def unseen(self) -> tuple[int, ...]:
        """Pairs that meet angles which pretraining never showed, within the new window."""
        return tuple(pair.index for pair in self.pairs if pair.meets_unseen_angles)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with `unseen`."""
        return {**asdict(self), "pairs": [asdict(pair) for pair in self.pairs], "unseen": list(self.unseen)}


def explain_scaling(old: RopeScaling, new: RopeScaling, to: int) -> ScalingExplanation:
    """What changes between two scalings of one model.

    Args:
        old: The source's scaling.
        new: The new one, with its original window.
        to: Tokens of the new window.
    """
    window = new.original_window
    assert window is not None, "a scaling that was chosen knows the window of pretraining"
    plain = replace(old, method="default", factor=1.0, attention_factor=None)
    unscaled, source, changed = (
        wavelengths(inverse_frequencies(scaling, length, torch.float64)[0]).tolist()
        for scaling, length in ((plain, None), (old, None), (new, to))
    )
    pairs = tuple(
        Pair(index, a, b, c, c / a, _kind(c / a, new.factor), window / a, to / c, to / a)
        for index, (a, b, c) in enumerate(zip(unscaled, source, changed, strict=True))
    )
    return ScalingExplanation(
        new.method,
        new.factor,
        window,
        to,
        new.theta,
        attention_factor(new),
        pairs,
        next((pair.index for pair in pairs if pair.turns < 1), None),
        new.method in ("dynamic", "longrope"),
    )


def _kind(divisor: float, factor: float) -> str:
    if abs(divisor - 1) <= SAME:
        return "kept"
    if divisor < 1:
        return "faster"
    # Without a factor (a larger base alone) there is no whole of it.
    if factor > 1 and abs(divisor / factor - 1) <= SAME:
        return "interpolated"
    return "slowed" if divisor > factor > 1 else "ramp"


def explanation_lines(found: ScalingExplanation) -> list[str]:
    """The explanation as text: what was chosen, which pairs change how, and which angles are new."""
    lines = [
        f"scaling: {found.method}, factor {found.factor:g}, base {found.theta:g}; {found.original_window:,} tokens of "
        f"pretraining, {found.new_window:,} wanted ({found.new_window / found.original_window:g} times as many)",
        f"attention factor {found.attention_factor:.4g}: attention logits are multiplied by "
        f"{found.attention_factor**2:.4g}",
        "",
        f"{'pairs':>9}  {'wavelength, tokens':>24}  {'in the new table':>24}  {'turns, old window':>20}  "
        f"{'turns, new window':>20}  what changes",
    ]
    for kind, run in _runs(found.pairs):
        first, last = run[0], run[-1]
        name = str(first.index) if len(run) == 1 else f"{first.index} to {last.index}"
        spans = (
            _span(first.wavelength, last.wavelength),
            _span(first.new_wavelength, last.new_wavelength),
            _span(first.turns, last.turns),
            _span(first.new_turns, last.new_turns),
        )
        by = "" if kind == "kept" else f" (divided by {_span(first.divisor, last.divisor)})"
        lines.append(f"{name:>9}  {spans[0]:>24}  {spans[1]:>24}  {spans[2]:>20}  {spans[3]:>20}  {KINDS[kind]}{by}")
    return [*lines, "", *_angles(found)]


def _angles(found: ScalingExplanation) -> list[str]:
    critical, count = found.critical_pair, len(found.pairs)
    if critical is None:
        lines = [
            f"Every pair makes a full turn within {found.original_window:,} tokens: no angle of the new window is new."
        ]
    else:
        lines = [
            f"Pairs from {critical} on (the critical pair) make less than one turn within {found.original_window:,} "
            f"tokens: unscaled, these {count - critical} of {count} would meet angles that pretraining never showed."
        ]
    if found.unseen:
        worst = max((found.pairs[index] for index in found.unseen), key=lambda pair: pair.new_turns / pair.turns)
        lines.append(
            f"With this scaling {len(found.unseen)} still do (pairs {_numbers(found.unseen)}): at {found.new_window:,} "
            f"tokens pair {worst.index} has turned {worst.new_turns / worst.turns:.3g} times as far as in pretraining."
        )
    elif critical is not None:
        lines.append("With this scaling none does.")
    if found.follows_length:
        lines.append(
            f"The table depends on the length of a text: this one is of {found.new_window:,} tokens, and texts up to "
            f"{found.original_window:,} have " + ("their own." if found.method == "longrope" else "the unscaled one.")
        )
    return lines


def _runs(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    for kind, run in groupby(pairs, key=lambda pair: pair.kind):
        yield kind, list(run)


def _span(first: float, last: float) -> str:
    one, other = (f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in (first, last))
    return one if one == other else f"{one} to {other}"


def _numbers(indices: Sequence[int]) -> str:
    """Indices as ranges: `3 to 7, 9`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
