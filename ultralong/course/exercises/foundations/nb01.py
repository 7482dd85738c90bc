"""Exercises of 01_rope_frequencies."""

from __future__ import annotations

import math
from typing import Any

import torch

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.foundations.configs import REPAIR
from ultralong.rope import RopeScaling, inverse_frequencies
from ultralong.rope import wavelengths as library_wavelengths

# Head size, base and pretraining window of five published configs (their `config.json`).
CONFIGS = {
    "Llama-2-7B": (128, 10_000.0, 4_096),
    "Llama-3-8B": (128, 500_000.0, 8_192),
    "Qwen2.5-7B": (128, 1_000_000.0, 32_768),
    "SmolLM2-135M": (64, 100_000.0, 8_192),
    "Mistral-7B-v0.1": (128, 10_000.0, 32_768),
}


def _exact(head_dim: int, base: float) -> torch.Tensor:
    return inverse_frequencies(RopeScaling("default", head_dim, base, original_window=1), dtype=torch.float64)[0]


# ---- 01.wavelength


def wavelength(pair: int, head_dim: int, base: float) -> float:
    """Tokens for one full turn of a pair."""
    return 2 * math.pi * base ** (2 * pair / head_dim)


def _check_wavelength(answer: Any) -> str:
    for head_dim, base in ((128, 500_000.0), (64, 100_000.0)):
        right = library_wavelengths(_exact(head_dim, base)).tolist()
        first, last, pair = answer(0, head_dim, base), answer(head_dim // 2 - 1, head_dim, base), head_dim // 4
        assert abs(first / right[0] - 1) < 1e-9, (
            f"Pair 0 turns by one radian a token, so a full turn takes 2 pi = 6.283 tokens; yours takes {first:.4g}. "
            "A wavelength counts a whole turn, 2 pi radians."
        )
        assert last > right[0], (
            f"Your last pair takes {last:.4g} tokens, fewer than pair 0. Later pairs are slower: their wavelength "
            "grows. Check the sign of the exponent."
        )
        found = answer(pair, head_dim, base)
        assert abs(found / right[pair] - 1) < 1e-9, (
            f"Pair {pair} of a head of {head_dim} with base {base:,.0f} takes {right[pair]:,.1f} tokens, yours "
            f"{found:,.1f}. The exponent is 2 i / D: i counts pairs, D counts numbers."
        )
    return "pair 0 turns once in 6.28 tokens, and each next pair is slower by the same factor."


# ---- 01.never


def never_turning(head_dim: int, base: float, window: int) -> int:
    """Number of pairs that never complete a turn in the window."""
    return sum(wavelength(pair, head_dim, base) > window for pair in range(head_dim // 2))


def _check_never(answer: Any) -> str:
    found = {}
    for name, (head_dim, base, window) in CONFIGS.items():
        right = int((library_wavelengths(_exact(head_dim, base)) > window).sum())
        said = answer(head_dim, base, window)
        assert not isinstance(said, list | tuple | set), (
            f"Give how many pairs there are, a number, not the pairs: {said}."
        )
        assert said != head_dim // 2 - right, (
            f"{name}: {said} pairs do complete a turn within {window:,} tokens. Asked are those that do not."
        )
        assert said != 2 * right or right == 0, (
            f"{name}: {said} is twice too many. A head of {head_dim} numbers has {head_dim // 2} pairs."
        )
        assert said == right, (
            f"{name}: {right} of {head_dim // 2} pairs never turn within {window:,} tokens, yours says {said}. A pair "
            "never turns when its wavelength, 2 pi over its frequency, is longer than the window."
        )
        found[name] = right
    return ", ".join(f"{name} {count}" for name, count in found.items())


# ---- 01.pairing


def rotate_half_split(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate a head, (D,), by angles, (D/2,); pair i is the numbers i and i + D/2."""
    first, second = vector.chunk(2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


def _rotate_interleaved(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    even, odd = vector[0::2], vector[1::2]
    return torch.stack(
        (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1
    ).flatten()


def _rotate_backwards(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return rotate_half_split(vector, -angles)


def _rotate_swapped(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = vector.chunk(2)
    return torch.cat((first * angles.cos() + second * angles.sin(), second * angles.cos() + first * angles.sin()))


def _check_pairing(answer: Any) -> str:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(16, generator=generator, dtype=torch.float64)
    angles = 37 * _exact(16, 10_000.0)
    both = torch.cat((angles, angles))
    given = vector[None, None, None]
    right, _ = apply_rotary_pos_emb(given, given, both.cos()[None, None], both.sin()[None, None])
    found = answer(vector.clone(), angles.clone())
    assert isinstance(found, torch.Tensor) and found.shape == vector.shape, (
        f"Give the rotated head as a tensor of its shape, {tuple(vector.shape)}; yours is "
        f"{type(found).__name__} {getattr(found, 'shape', found)}."
    )
    assert not torch.allclose(found, _rotate_interleaved(vector, angles)), (
        "You pair neighbours, numbers 2i and 2i + 1 (interleaved), as the original paper does. Llama's weights in "
        "transformers pair number i with number i + D/2. With the other pairing a model answers nonsense, silently."
    )
    assert not torch.allclose(found, _rotate_backwards(vector, angles)), (
        "You turn backwards: the first number becomes first * cos - second * sin."
    )
    assert torch.allclose(found.norm(), vector.norm()), (
        f"A rotation keeps the length, {vector.norm():.4f}; yours has {found.norm():.4f}. One of the two sines needs a "
        "minus sign."
    )
    assert torch.allclose(found, right[0, 0, 0]), "The length is right, the numbers are not what transformers computes."
    return "the same as transformers' apply_rotary_pos_emb, to the last digits of float64."


# ---- 01.largest_position


def largest_position(limit: float) -> int:
    """The largest power of two at which the float32 angle of every pair is off by less than `limit` radians."""
    for power in range(30, 0, -1):
        if _error_before(2**power) < limit:
            return 2**power
    raise ValueError(f"No position has an error below {limit}.")


def _error_before(end: int) -> float:
    """Largest error of a float32 angle over the last 4,096 positions before `end`, in radians."""
    table = _exact(128, 500_000.0).float()
    positions = torch.arange(max(0, end - 4096), end)[:, None]
    return float(((positions.float() * table).double() - positions.double() * table.double()).abs().max())


def _check_largest(answer: Any) -> str:
    right = largest_position(0.01)
    found = int(answer)
    assert found != 2**24, (
        "2^24 is where float32 stops to hold every whole number. The angle is a product of position and frequency, "
        "and its own rounding counts earlier: multiply in float32 and in float64 and compare."
    )
    assert found != 256, "256 is the limit of bfloat16 positions. Angles are computed in float32."
    assert found > 0 and found & (found - 1) == 0, f"{found:,} is not a power of two."
    assert found <= right, (
        f"At {found:,} tokens the fastest pairs are off by more than 0.01 radians. Look at the largest error over all "
        "pairs and over many positions near the end, not at one position."
    )
    assert found == right, (
        f"{found:,} is not the largest power of two: with {2 * found:,} tokens the largest error is "
        f"{_error_before(2 * found):.4f} radians, still below 0.01."
    )
    return f"up to {right:,} tokens every angle is good to 0.01 radians."


EXERCISES = (
    Exercise(
        name="01.wavelength",
        title="Tokens for one turn",
        task=(
            "Write `wavelength(pair, head_dim, base)`: return how many tokens one full turn of a pair takes, a float."
        ),
        check=_check_wavelength,
        solution=wavelength,
        mistakes=(
            Mistake("no 2 pi", lambda i, d, b: b ** (2 * i / d), "2 pi"),
            Mistake("negative exponent", lambda i, d, b: 2 * math.pi * b ** (-2 * i / d), "sign of the exponent"),
            Mistake("i / D", lambda i, d, b: 2 * math.pi * b ** (i / d), "2 i / D"),
            Mistake("raises", lambda i, d, b: 1 / 0, "ZeroDivisionError"),
        ),
        hints=(
            "How many radians does a pair turn in one token? How many radians are a full turn?",
            "The frequency is base ** (-2 * pair / head_dim) radians a token.",
            "2 pi divided by the frequency.",
        ),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="01.never",
        title="Pairs that never turn",
        task=(
            "Write `never_turning(head_dim, base, window)`: return how many pairs never complete a turn in the window."
        ),
        check=_check_never,
        solution=never_turning,
        mistakes=(
            Mistake(
                "those that turn",
                lambda d, b, w: sum(wavelength(i, d, b) <= w for i in range(d // 2)),
                "those that do not",
            ),
            Mistake(
                "counts numbers",
                lambda d, b, w: 2 * sum(wavelength(i, d, b) > w for i in range(d // 2)),
                "twice too many",
            ),
            Mistake(
                "radians for turns",
                lambda d, b, w: sum(wavelength(i, d, b) / (2 * math.pi) > w for i in range(d // 2)),
                "2 pi over its frequency",
            ),
        ),
        hints=(
            "Use `wavelength`.",
            "A head of D numbers has D / 2 pairs; count those whose wavelength exceeds the window.",
        ),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="01.pairing",
        title="Rotate a head as transformers does",
        task=(
            "Write `rotate(vector, angles)`: given a head of D numbers, (D,), and one angle in radians for "
            "each pair, (D/2,), return the rotated head, (D,), with the pairs that transformers uses."
        ),
        check=_check_pairing,
        solution=rotate_half_split,
        mistakes=(
            Mistake("interleaved", _rotate_interleaved, "pair neighbours"),
            Mistake("backwards", _rotate_backwards, "turn backwards"),
            Mistake("sign", _rotate_swapped, "minus sign"),
            Mistake("half the shape", lambda v, a: v[: len(a)] * a.cos(), "tensor of its shape"),
        ),
        hints=(
            "Which two numbers of the head belong to pair i? Look at transformers' rotate_half.",
            "(x, y) turned by an angle is (x cos - y sin, y cos + x sin).",
            "x is the first half of the head, y the second half.",
        ),
        minutes=8,
    ),
    REPAIR,
    Exercise(
        name="01.largest_position",
        title="How far float32 carries an angle",
        task=(
            "Give the largest power of two up to which every angle of Llama 3's table (128, base 500,000), computed in "
            "float32, is off by less than 0.01 radians."
        ),
        check=_check_largest,
        solution=262_144,
        mistakes=(
            Mistake("whole numbers", 2**24, "float32 stops to hold every whole number"),
            Mistake("bfloat16", 256, "bfloat16"),
            Mistake("one position", 2**20, "off by more than 0.01"),
            Mistake("too careful", 131_072, "largest power of two"),
        ),
        hints=(
            "Compare position * frequency in float32 with the same product in float64.",
            "Take the largest error over all pairs and the last 4,096 positions, and double the length until it "
            "is 0.01.",
        ),
        minutes=8,
    ),
)
