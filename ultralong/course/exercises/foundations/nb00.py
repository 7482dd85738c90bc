"""Exercises of 00_quickstart."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from ultralong import miniature
from ultralong.checkpoints.extend import extend
from ultralong.course.exercise import Exercise, Mistake
from ultralong.evaluation.runs.commands import measure_one

# Needles found of 80 by SmolLM2-135M-Instruct, window 8K to 64K (recorded: notebooks/results/demo_smollm2.json and the
# rescaled-only run beside it). Stages: before, rescaled only, trained.
FOUND = {"before": 0, "rescaled": 6, "trained": 60}
OF = 80


# ---- 00.gain


def gains(found: dict[str, int], of: int) -> dict[str, float]:
    """Share of needles that each step of the recipe added: rescaling, and training on top of it."""
    return {
        "rescaling": (found["rescaled"] - found["before"]) / of,
        "training": (found["trained"] - found["rescaled"]) / of,
    }


def _check_gain(answer: Any) -> str:
    for found, of in ((FOUND, OF), ({"before": 10, "rescaled": 30, "trained": 30}, 40)):
        right, said = gains(found, of), answer(dict(found), of)
        assert isinstance(said, dict) and set(said) == {"rescaling", "training"}, (
            f"Give a dict with the keys 'rescaling' and 'training'; found {said!r}."
        )
        assert abs(said["training"] - (found["trained"] - found["before"]) / of) > 1e-9 or right["rescaling"] == 0, (
            f"Training gets {said['training']:.0%} here, which counts from before anything was done: what rescaling "
            "alone does is credited to training. Compare with the rescaled-only stage."
        )
        assert all(abs(value) <= 1 for value in said.values()), "Give shares of all needles, 0 to 1, not counts."
        assert abs(said["rescaling"] - right["rescaling"]) < 1e-9, (
            f"Rescaling took {found['before']} to {found['rescaled']} of {of}: {right['rescaling']:.3f}, yours "
            f"{said['rescaling']:.3f}."
        )
        assert abs(said["training"] - right["training"]) < 1e-9, (
            f"Training took {found['rescaled']} to {found['trained']} of {of}: {right['training']:.3f}, yours "
            f"{said['training']:.3f}."
        )
    right = gains(FOUND, OF)
    return f"rescaling {right['rescaling']:+.1%}, training {right['training']:+.1%} of {OF} needles."


# ---- 00.factor


def smallest_factor(window: int, longest: int) -> int:
    """The smallest whole factor whose window holds a prompt of `longest` tokens."""
    return -(-longest // window)


def _check_factor(answer: Any) -> str:
    for window, longest in ((512, 4096), (8192, 65_537), (8192, 8192)):
        right, found = smallest_factor(window, longest), answer(window, longest)
        assert int(found) == found or found * window != longest, f"A factor of {found} is no whole number: round up."
        assert found * window >= longest, (
            f"{found} x {window:,} = {found * window:,} tokens do not hold {longest:,}: round up."
        )
        assert found == right, (
            f"{right} x {window:,} tokens are enough for {longest:,}; {found} slows the pairs down more than needed."
        )
    return "rounded up, and no larger: every further factor makes neighbouring positions harder to tell apart."


# ---- 00.wilson


def wilson(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959963984540054
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return middle - half, middle + half


def _wald(right: int, of: int) -> tuple[float, float]:
    share = right / of
    half = 1.96 * math.sqrt(share * (1 - share) / of)
    return share - half, share + half


def _check_wilson(answer: Any) -> str:
    for right, of in ((2, 2), (60, 80), (0, 6)):
        expected, given = wilson(right, of), answer(right, of)
        assert hasattr(given, "__len__") and len(given) == 2, f"Give (low, high), found {given!r}."
        found = tuple(float(end) for end in given)
        assert found[0] != found[1], (
            f"{right} of {of} gave an interval of no width: p (1 - p) / n is 0 there. Two of two is no proof of 100%; "
            "use Wilson's formula."
        )
        assert found[0] >= -1e-9 and found[1] <= 1 + 1e-9, (
            f"{right} of {of}: {found} leaves 0..1, as Wald's interval does."
        )
        assert abs(found[0] - expected[0]) < 0.003 and abs(found[1] - expected[1]) < 0.003, (
            f"{right} of {of}: {expected[0]:.3f} to {expected[1]:.3f}, yours {found[0]:.3f} to {found[1]:.3f}. Use "
            "z = 1.96 for 95%."
        )
    low, high = wilson(2, 2)
    return f"2 of 2 says: between {low:.0%} and {high:.0%}. That is why grids are asked many times."


# ---- 00.settings

LONGER, WINDOW, ENOUGH = 2048, 512, 5  # tokens of the prompts, the miniature's window, needles of six


def found_with(factor: float, beta: float) -> tuple[int, int]:
    """Needles found and asked at 2,048 tokens by the miniature, rescaled with YaRN and not trained.

    Raises:
        ValueError: The window does not reach so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        rescaled = Path(folder) / "rescaled"
        extend(miniature.path(), to=LONGER, out=rescaled, factor=factor, beta=beta, quiet=True)
        asked = measure_one(
            "needle", rescaled, lengths=[LONGER], depths=[0.1, 0.5, 0.9], samples=2, seed=0, device="cpu"
        )
    cell = asked["results"][0]["by_length"][0]
    return round(cell["value"] * cell["n"] / 100), cell["n"]


def _check_settings(answer: Any) -> str:
    assert isinstance(answer, dict) and set(answer) == {"factor", "beta"}, (
        f"Give a dict with the keys 'factor' and 'beta'; found {answer!r}."
    )
    factor, beta = float(answer["factor"]), float(answer["beta"])
    try:
        found, asked = found_with(factor, beta)
    except ValueError as error:
        raise AssertionError(f"`extend` refuses it: {error}") from error
    said = f"Asked just now: {found} of {asked} with factor {factor:g} and beta {beta:g}. "
    ratio = LONGER / WINDOW
    assert found >= ENOUGH or factor <= 4 * ratio, (
        said + f"The slow pairs are slowed {factor:g} times, where {ratio:g} would reach {LONGER:,} tokens: far places "
        "look alike to a model that was not trained on them."
    )
    assert found >= ENOUGH or factor > 1.5 * ratio, (
        said
        + f"{factor:g} x {WINDOW} tokens are just {LONGER:,}, and a model is weakest at the end of its window. Take "
        "a larger factor, or slow fewer pairs down half-way: beta decides which."
    )
    assert found >= ENOUGH, said + "The factor is near; try another beta."
    return f"{found} of {asked} needles at four windows, with no training."


EXERCISES = (
    Exercise(
        name="00.gain",
        title="Which step did what",
        task=(
            "Write `gains(found, of)`: `found` says how many needles were found 'before', 'rescaled' and "
            "'trained'; `of` needles were asked each time. Return a dict: the share of all needles that "
            "'rescaling' and 'training' each added."
        ),
        check=_check_gain,
        solution=gains,
        mistakes=(
            Mistake(
                "training from the start",
                lambda f, n: {
                    "rescaling": (f["rescaled"] - f["before"]) / n,
                    "training": (f["trained"] - f["before"]) / n,
                },
                "credited to training",
            ),
            Mistake(
                "counts",
                lambda f, n: {"rescaling": f["rescaled"] - f["before"], "training": f["trained"] - f["rescaled"]},
                "not counts",
            ),
            Mistake("one number", lambda f, n: (f["trained"] - f["before"]) / n, "Give a dict"),
        ),
        hints=("Every stage is compared with the one before it.", "Rescaled only stands between before and trained."),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="00.factor",
        title="The smallest factor",
        task=(
            "Write `smallest_factor(window, longest)`: return the smallest whole factor for which `factor * "
            "window` tokens hold a prompt of `longest` tokens."
        ),
        check=_check_factor,
        solution=smallest_factor,
        mistakes=(
            Mistake("rounds down", lambda w, n: max(1, n // w), "round up"),
            Mistake("one too many", lambda w, n: n // w + 1, "more than needed"),
            Mistake("not whole", lambda w, n: n / w, "whole number"),
        ),
        hints=("window x factor has to hold the prompt.", "Round the quotient up."),
        difficulty="easy",
        minutes=3,
    ),
    Exercise(
        name="00.settings",
        title="Settings that work, without training",
        task=(
            "Give a dict {'factor': ..., 'beta': ...} for YaRN with which the miniature (window 512, not trained) "
            "finds at least 5 of 6 needles at 2,048 tokens. The check asks it, which takes some seconds."
        ),
        check=_check_settings,
        solution={"factor": 8, "beta": 16},
        mistakes=(
            Mistake("just enough, the recipe's beta", {"factor": 4, "beta": 4}, "weakest at the end of its window"),
            Mistake("much more", {"factor": 32, "beta": 16}, "far places look alike"),
            Mistake("too little", {"factor": 2, "beta": 16}, "`extend` refuses it"),
            Mistake("a number", 8, "Give a dict with the keys"),
        ),
        hints=(
            "Which factor is just enough for four windows? And which did the notebook take for three?",
            "Twice the ratio of the windows, and a beta from the text above.",
        ),
        minutes=6,
    ),
    Exercise(
        name="00.wilson",
        title="What 2 of 2 says",
        task=("Write `wilson(right, of)`: return Wilson's 95% interval of the share right / of, as (low, high)."),
        check=_check_wilson,
        solution=wilson,
        mistakes=(
            Mistake("Wald", _wald, "no width"),
            Mistake("no interval", lambda right, of: right / of, "Give (low, high)"),
            Mistake("68%", lambda right, of: _at(right, of, 1.0), "z = 1.96"),
            Mistake("not bounded", lambda right, of: (right / of - 0.3, right / of + 0.3), "leaves 0..1"),
        ),
        hints=(
            "Wald's interval, p plus or minus 1.96 sqrt(p (1 - p) / n), has no width at p = 1.",
            "The middle is (p + z^2 / 2n) / (1 + z^2 / n); look Wilson's score interval up for its half width.",
        ),
        minutes=8,
    ),
)


def _at(right: int, of: int, z: float) -> tuple[float, float]:
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return middle - half, middle + half
