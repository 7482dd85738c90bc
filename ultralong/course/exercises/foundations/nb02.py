"""Exercises of 02_yarn."""

from __future__ import annotations

import math
from typing import Any

import torch

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.foundations.configs import CONFIG
from ultralong.rope import RopeScaling, inverse_frequencies

HEAD_DIM, BASE, WINDOW = 128, 500_000.0, 8_192


def _plain() -> torch.Tensor:
    return inverse_frequencies(RopeScaling("default", HEAD_DIM, BASE, original_window=1), dtype=torch.float64)[0]


# ---- 02.ramp


def ramp(turns: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Share of a pair's frequency that is kept: 0 up to alpha turns in the window, 1 from beta turns on."""
    return ((turns - alpha) / (beta - alpha)).clamp(0, 1)


def _check_ramp(answer: Any) -> str:
    turns = torch.tensor([0.1, 1.0, 2.5, 4.0, 900.0], dtype=torch.float64)
    found = answer(turns, 1.0, 4.0)
    assert isinstance(found, torch.Tensor) and found.shape == turns.shape, (
        f"One share for each pair, a tensor {tuple(turns.shape)}; yours is {type(found).__name__} "
        f"{getattr(found, 'shape', found)}."
    )
    first, last = float(found[0]), float(found[-1])
    assert not (first == 1 and last == 0), (
        "Reversed: a pair with many turns (the last one here) has seen its whole circle and keeps its frequency, "
        "share 1; a pair that never turns is slowed by the whole factor, share 0."
    )
    assert float(found.min()) >= 0 and float(found.max()) <= 1, (
        f"Shares reach from {float(found.min()):.3g} to {float(found.max()):.3g}. Outside of alpha..beta they "
        f"stay at 0 "
        "and 1: clamp them."
    )
    assert abs(float(found[2]) - 0.5) < 1e-9, (
        f"2.5 turns lie half-way between alpha = 1 and beta = 4, so half is kept; yours keeps {float(found[2]):.3f}. "
        "The recipe's ramp is linear in turns, not in the pair's index and not in the logarithm."
    )
    assert torch.allclose(found, ramp(turns, 1.0, 4.0)), (
        f"Expected {ramp(turns, 1.0, 4.0).tolist()}, found {found.tolist()}."
    )
    return "0 for pairs that never turned once, 1 from beta turns on, linear in between."


# ---- 02.yarn


def yarn(factor: float, alpha: float, beta: float) -> torch.Tensor:
    """Scaled inverse frequencies of Llama 3's table, (64,), in float64."""
    frequencies = _plain()
    keep = ramp(WINDOW * frequencies / (2 * math.pi), alpha, beta)
    return keep * frequencies + (1 - keep) * frequencies / factor


def _yarn_factor_times_eight(factor: float, alpha: float, beta: float) -> torch.Tensor:
    return yarn(8 * factor, alpha, beta)


def _yarn_by_wavelength(factor: float, alpha: float, beta: float) -> torch.Tensor:
    keep = ramp(WINDOW * _plain() / (2 * math.pi), alpha, beta)
    return 1 / (keep / _plain() + (1 - keep) * factor / _plain())


def _linear(factor: float, alpha: float, beta: float) -> torch.Tensor:
    return _plain() / factor


def _ramp_without_two_pi(factor: float, alpha: float, beta: float) -> torch.Tensor:
    keep = ramp(WINDOW * _plain(), alpha, beta)
    return keep * _plain() + (1 - keep) * _plain() / factor


def _check_yarn(answer: Any) -> str:
    for factor in (128.0, 512.0):
        scaling = RopeScaling("llama3", HEAD_DIM, BASE, factor, WINDOW, alpha=1.0, beta=4.0)
        right = inverse_frequencies(scaling, dtype=torch.float64)[0]
        found = answer(factor, 1.0, 4.0)
        assert isinstance(found, torch.Tensor) and found.shape == right.shape, (
            f"Llama 3's head has 64 pairs, a tensor (64,); yours gives {getattr(found, 'shape', found)}."
        )
        assert found.dtype == torch.float64, f"Give float64, yours is {found.dtype}: float32 hides small differences."
        slow, fast = float(_plain()[-1] / found[-1]), float(_plain()[0] / found[0])
        assert abs(fast - 1) < 1e-9, (
            f"Pair 0 turns thousands of times in the window and keeps its frequency; yours is {fast:.3g} times slower. "
            "Slowing every pair alike is position interpolation."
        )
        assert abs(slow / (8 * factor) - 1) > 1e-9, (
            f"The slowest pair is {slow:,.0f} times slower: the factor replaces Llama 3.1's own 8, it does not "
            f"multiply it."
        )
        assert abs(slow / factor - 1) < 1e-9, (
            f"The slowest pair should be {factor:g} times slower, yours is {slow:,.3g}."
        )
        assert torch.allclose(found, right, rtol=1e-9), (
            f"The ends are right; pair {int((found / right - 1).abs().argmax())} on the ramp is not. Blend "
            f"frequencies, "
            "not wavelengths, and count turns as window / wavelength, a full turn being 2 pi."
        )
    return "the recipe's table for 1M and 4M tokens, as in ultralong.rope and in transformers' llama3 type."


# ---- 02.faults

# Each is a config of Llama-3.1-8B extended to 1M with one fault planted, and one that has none.
_GOOD = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 128.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAULTY = {
    "A": {"max_position_embeddings": 1048576, "rope_parameters": {**_GOOD, "factor": 8.0}},
    "B": {"max_position_embeddings": 131072, "rope_parameters": _GOOD},
    "C": {"max_position_embeddings": 1048576, "rope_parameters": {**_GOOD, "original_max_position_embeddings": 131072}},
    "D": {"max_position_embeddings": 1048576, "rope_parameters": _GOOD},
}
FAULTS = ("factor", "max_position_embeddings", "original_max_position_embeddings", "none")
_ANSWER = {"A": "factor", "B": "max_position_embeddings", "C": "original_max_position_embeddings", "D": "none"}
_WHY = {
    "A": "8 x 8,192 tokens are 64K: beyond that the slow pairs meet new angles. 1M needs 128.",
    "B": "the table reaches 1M, but servers cap requests at max_position_embeddings, 128K here.",
    "C": "turns are counted in the window of pretraining, 8,192; with 131,072 other pairs are slowed.",
    "D": "this one is the recipe's own.",
}


def _check_faults(answer: Any) -> str:
    assert isinstance(answer, dict) and set(answer) == set(FAULTY), (
        f"Give a dict with the keys {', '.join(FAULTY)}; found {answer!r}."
    )
    for name, said in answer.items():
        assert said in FAULTS, f"{name}: {said!r} is not one of {', '.join(FAULTS)}."
    wrong = [name for name in FAULTY if answer[name] != _ANSWER[name]]
    assert not wrong, f"{wrong[0]} is not explained by {answer[wrong[0]]!r}: {_WHY[wrong[0]]}"
    return "; ".join(f"{name}: {why}" for name, why in _WHY.items())


# ---- 02.temperature


def temperature(factor: float) -> float:
    """By what YaRN's own attention factor multiplies a score of query and key."""
    return (0.1 * math.log(factor) + 1) ** 2


def _check_temperature(answer: Any) -> str:
    for factor in (4.0, 128.0):
        right, found = temperature(factor), float(answer(factor))
        assert abs(found - math.sqrt(right)) > 1e-9, (
            f"{found:.4f} multiplies cosine and sine, of the query and of the key: a score gets it twice."
        )
        assert abs(found * math.sqrt(HEAD_DIM) / right - 1) > 1e-6, (
            "1 / sqrt(D) is there with and without YaRN: leave it out."
        )
        assert abs(found / right - 1) < 1e-6, (
            f"For factor {factor:g} a score is multiplied by {right:.4f}, yours says {found:.4f}. The paper's "
            f"factor is "
            "0.1 ln(s) + 1, with the natural logarithm."
        )
    return f"at factor 128 scores grow by {temperature(128.0):.2f}: a sharper softmax over more keys."


EXERCISES = (
    Exercise(
        name="02.ramp",
        title="Which share of a pair's frequency is kept",
        task=(
            "Write `ramp(turns, alpha, beta)`: `turns` says how often each pair turns in the window, a "
            "float64 tensor. Return the share of its frequency that each pair keeps, from 0 to 1."
        ),
        check=_check_ramp,
        solution=ramp,
        mistakes=(
            Mistake("reversed", lambda t, a, b: 1 - ramp(t, a, b), "Reversed"),
            Mistake("not clamped", lambda t, a, b: (t - a) / (b - a), "clamp"),
            Mistake("by index", lambda t, a, b: torch.linspace(0, 1, len(t), dtype=t.dtype) ** 2, "linear in turns"),
            Mistake(
                "logarithm",
                lambda t, a, b: ((t / a).log() / math.log(b / a)).clamp(0, 1),
                "not in the logarithm",
            ),
        ),
        hints=("Up to alpha turns: 0. From beta turns on: 1.", "(turns - alpha) / (beta - alpha), clamped."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="02.yarn",
        title="The recipe's table",
        task=(
            "Write `yarn(factor, alpha, beta)`: return the scaled inverse frequencies of Llama 3 (head size "
            "128, base 500,000, pretraining window 8,192) in radians a token, (64,), float64."
        ),
        check=_check_yarn,
        solution=yarn,
        mistakes=(
            Mistake("factor x 8", _yarn_factor_times_eight, "replaces"),
            Mistake("blends wavelengths", _yarn_by_wavelength, "Blend frequencies"),
            Mistake("position interpolation", _linear, "position interpolation"),
            Mistake("no 2 pi", _ramp_without_two_pi, "2 pi"),
        ),
        hints=(
            "A pair keeps ramp(turns) of its frequency, and gets the rest divided by the factor.",
            "turns = window * frequency / (2 pi).",
        ),
        minutes=8,
    ),
    Exercise(
        name="02.faults",
        title="Find the planted fault",
        task=(
            "Four configs say that they are Llama-3.1-8B extended to 1M by the recipe (`FAULTY`). Give a dict from "
            "A, B, C, D to the key that is wrong, or 'none'."
        ),
        check=_check_faults,
        solution=_ANSWER,
        mistakes=(
            Mistake("A by window", {**_ANSWER, "A": "max_position_embeddings"}, "1M needs 128"),
            Mistake("B fine", {**_ANSWER, "B": "none"}, "cap requests"),
            Mistake("C fine", {**_ANSWER, "C": "none"}, "window of pretraining"),
            Mistake("list", ["factor"], "Give a dict"),
        ),
        hints=("factor x original_max_position_embeddings should be the window.", "Which window did pretraining have?"),
        minutes=6,
    ),
    CONFIG,
    Exercise(
        name="02.temperature",
        title="What YaRN's temperature does to a score",
        task=(
            "Write `temperature(factor)`: return the number by which YaRN's own attention factor multiplies "
            "a score of query and key."
        ),
        check=_check_temperature,
        solution=temperature,
        mistakes=(
            Mistake("once", lambda s: 0.1 * math.log(s) + 1, "twice"),
            Mistake("with 1/sqrt(D)", lambda s: temperature(s) / math.sqrt(HEAD_DIM), "leave it out"),
            Mistake("decimal logarithm", lambda s: (0.1 * math.log10(s) + 1) ** 2, "natural logarithm"),
        ),
        hints=("Cosine and sine are multiplied by 0.1 ln(s) + 1.", "Both the query and the key are rotated."),
        minutes=4,
    ),
)
