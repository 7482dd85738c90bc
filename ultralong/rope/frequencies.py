"""Rotary position scaling: each method as one pure function from its settings to a table of inverse frequencies.

Shapes: D head size, R = D * partial_rotary_factor rotated sizes, R/2 pairs.

Conventions. Pair i of a head turns by `inv_freq[i]` radians a token, `inv_freq[i] = theta ** (-2i / R)` before scaling.
Its wavelength is `2 pi / inv_freq[i]` tokens, and within a window of L tokens it makes `r = L / wavelength` turns.
A pair with many turns tells near neighbours apart and must keep its speed; a pair that never completes one turn in
training meets unseen angles beyond the window and must be slowed down by the factor. The methods differ in what they do
in between. The attention factor multiplies both cosine and sine, so attention logits carry its square.

Float32 tables follow the order of operations of transformers' own initialisers, so that both agree to the last bit.
Sources: RoPE, arXiv 2104.09864; position interpolation, 2306.15595; YaRN, 2309.00071; LongRoPE, 2402.13753; the
`llama3` type as released with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ultralong.rope.config import from_config, window_of
from ultralong.rope.scaling import HAS_ATTENTION_FACTOR, METHODS, RopeScaling, require

__all__ = [
    "METHODS",
    "RopeScaling",
    "attention_factor",
    "from_config",
    "inverse_frequencies",
    "pair_counts",
    "rope_parameters",
    "wavelengths",
    "window_of",
]


def inverse_frequencies(
    scaling: RopeScaling, length: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, float]:
    """The rotary table of a scaling.

    Args:
        scaling: The method and its settings.
        length: Tokens in the input, for the two methods whose table depends on it ("dynamic", "longrope"); None means
            an input within the original window.
        dtype: float32 equals what transformers computes to the last bit; float64 is the same formula, more exact.

    Returns:
        Inverse frequencies in radians a token, (R/2,), fastest pair first, and the attention factor.
    """
    exponents = torch.arange(0, scaling.rotary_dim, 2, dtype=torch.int64).to(dtype) / scaling.rotary_dim  # (R/2,)
    table = _TABLES[scaling.method](scaling, exponents, length)
    return table, attention_factor(scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """What cosine and sine are multiplied by: the number set, or the method's own.

    The own one is `0.1 ln(factor) + 1` for "yarn" (the paper's temperature), `sqrt(1 + ln(factor) / ln(L))` for
    "longrope", and 1 for all others.
    """
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.method == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    if scaling.method == "longrope":
        return math.sqrt(1.0 + math.log(scaling.factor) / math.log(_window(scaling)))
    return 1.0


def wavelengths(inv_freq: torch.Tensor) -> torch.Tensor:
    """Tokens that each pair needs for one full turn, (R/2,)."""
    return 2 * math.pi / inv_freq


def pair_counts(scaling: RopeScaling, length: int | None = None, theta: float | None = None) -> dict[str, int]:
    """How many pairs a scaling leaves untouched, slows down by the whole factor, or puts in between ("ramp").

    Args:
        scaling: The scaling to describe.
        length: As in `inverse_frequencies`.
        theta: Base of the unscaled table to compare with; None for the scaling's own.
    """
    plain = replace(scaling, method="default", attention_factor=None, theta=theta or scaling.theta)
    speed = (
        inverse_frequencies(scaling, length, torch.float64)[0] / inverse_frequencies(plain, dtype=torch.float64)[0]
    )  # (R/2,)
    untouched = int((speed - 1.0).abs().lt(1e-9).sum())
    scaled = 0 if scaling.factor == 1.0 else int(speed.le((1.0 + 1e-9) / scaling.factor).sum())
    return {"untouched": untouched, "ramp": len(speed) - untouched - scaled, "scaled": scaled}


def rope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_parameters` entry of a transformers 5 config that reproduces the table exactly.

    The static "ntk" method becomes the "default" type with its changed base. YaRN with the paper's ramp and no
    attention factor is the `llama3` type by another name, and is written as that.

    Raises:
        ValueError: transformers (and vLLM) can't express it: the paper's ramp together with an attention factor.
    """
    kind = _written_type(scaling)
    theta = _changed_base(scaling, scaling.factor) if scaling.method == "ntk" else scaling.theta
    written: dict[str, Any] = {"rope_type": kind, "rope_theta": float(theta)}
    if scaling.partial_rotary_factor != 1.0:
        written["partial_rotary_factor"] = scaling.partial_rotary_factor
    if kind == "default":
        return written
    written["factor"] = float(scaling.factor)
    if kind in ("yarn", "llama3", "longrope"):
        written["original_max_position_embeddings"] = _window(scaling)
    if kind == "llama3":
        written |= {"low_freq_factor": float(scaling.alpha), "high_freq_factor": float(scaling.beta)}
    if kind == "yarn":
        written |= {"beta_fast": float(scaling.beta), "beta_slow": float(scaling.alpha)}
        written |= {} if scaling.truncate else {"truncate": False}
    if kind == "longrope":
        written |= {"short_factor": list(scaling.short_factors or ()), "long_factor": list(scaling.long_factors or ())}
    if kind in HAS_ATTENTION_FACTOR and scaling.attention_factor is not None:
        written["attention_factor"] = float(scaling.attention_factor)
    return written


def _written_type(scaling: RopeScaling) -> str:
    if scaling.method == "yarn" and scaling.ramp == "rotations":
        require(
            attention_factor(scaling) == 1.0,
            "YaRN with ramp='rotations' and an attention factor has no type in transformers or vLLM. Use "
            "ramp='dimension' (their YaRN), or keep the ramp and set attention_factor=1.0 (their 'llama3' type).",
        )
        return "llama3"
    return "default" if scaling.method == "ntk" else scaling.method


def _plain(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    return 1.0 / scaling.theta**exponents


def _linear(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    return _plain(scaling, exponents, length) / scaling.factor


def _ntk(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    return 1.0 / _changed_base(scaling, scaling.factor) ** exponents


def _dynamic(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    window = _window(scaling)
    stretch = (scaling.factor * max(length or window, window) / window) - (scaling.factor - 1)
    return 1.0 / _changed_base(scaling, stretch) ** exponents


def _by_rotations(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    inv_freq = _plain(scaling, exponents, length)
    turns = _window(scaling) / wavelengths(inv_freq)
    keep = ((turns - scaling.alpha) / (scaling.beta - scaling.alpha)).clamp(0, 1)  # 1 where the speed is kept
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def _by_dimension(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    first, last = _ramp_ends(scaling)
    index = torch.arange(len(exponents), dtype=torch.float32).to(exponents.dtype)
    keep = 1 - ((index - first) / (last - first)).clamp(0, 1)  # 1 where the speed is kept
    periods = scaling.theta**exponents
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    return (_by_rotations if scaling.ramp == "rotations" else _by_dimension)(scaling, exponents, length)


def _longrope(scaling: RopeScaling, exponents: torch.Tensor, length: int | None) -> torch.Tensor:
    factors = scaling.long_factors if length is not None and length > _window(scaling) else scaling.short_factors
    return 1.0 / (torch.tensor(factors, dtype=exponents.dtype) * scaling.theta**exponents)


_TABLES: Mapping[str, Callable[[RopeScaling, torch.Tensor, int | None], torch.Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _by_rotations,
    "longrope": _longrope,
}


def _changed_base(scaling: RopeScaling, stretch: float) -> float:
    """NTK-aware base: the slowest pair ends up exactly `stretch` times slower, the fastest one as before."""
    return scaling.theta * stretch ** (scaling.rotary_dim / (scaling.rotary_dim - 2))


def _ramp_ends(scaling: RopeScaling) -> tuple[float, float]:
    """First and last pair index of the "dimension" ramp: where a pair makes beta and alpha turns in the window."""

    def index(turns: float) -> float:
        size, window = scaling.rotary_dim, _window(scaling)
        return (size * math.log(window / (turns * 2 * math.pi))) / (2 * math.log(scaling.theta))

    first, last = index(scaling.beta), index(scaling.alpha)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, scaling.rotary_dim - 1)
    return first, last + 0.001 if first == last else last


def _window(scaling: RopeScaling) -> int:
    assert scaling.original_window is not None  # checked when the scaling was made
    return scaling.original_window
