"""Exercises of 11_ablations: a number that refutes, seeds for an effect, the unfair one of four designs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ultralong.ablation.design import Design
from ultralong.ablation.study import Arm, Refutation, changed, load_study
from ultralong.course.exercise import Exercise, Mistake

# ---- 11.refute

BEYOND = "perplexity beyond the old window"
HYPOTHESIS = "Without a separator, perplexity beyond the old window is at least 2 per cent higher."
REFUTED = {"outcome": BEYOND, "below": 2}


def check_refute(answer: Any) -> str:
    """Read the answer as a study would, and ask it about intervals on both sides of the number."""
    assert isinstance(answer, dict), f"Give a dict as in a study's YAML: outcome, and below or above; found {answer!r}."
    try:
        refutation = Refutation(**answer)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"A study refuses it: {error}") from error
    assert refutation.outcome == BEYOND, (
        f"The hypothesis is about {BEYOND!r}. {refutation.outcome!r} could refute something else."
    )
    assert refutation.above is None, (
        f"A rise above {refutation.above:g} per cent is what the hypothesis says: it would confirm and not refute it."
    )
    number = refutation.below
    assert number is not None
    assert number >= 0, f"It says higher: a change from {number:g} to 0 per cent is no rise, and has to refute it too."
    assert number != 0, "At 0, a rise of half a per cent refutes nothing. The hypothesis says at least 2 per cent."
    assert number >= 1, f"Differences of perplexity are in per cent, not in shares: {number:g} is {number:g} per cent."
    assert number == 2, f"The hypothesis says at least 2 per cent, and yours is refuted below {number:g}."
    found = [refutation.verdict(*ends) for ends in ((-1.0, 1.5), (1.0, 3.0), (2.5, 6.0))]
    assert found == ["refuted", "undecided", "not refuted"], f"The verdicts come out as {found}."
    return "-1 to +1.5 refutes it, +2.5 to +6 does not, and +1 to +3 leaves it undecided."


# ---- 11.seeds

# Student's 97.5% quantile for the mean of so many values.
STUDENT = {
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228,
    12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101, 20: 2.093,
}  # fmt: skip


def seeds(effect: float, spread: float) -> int:
    """The fewest seeds whose 95% interval around a difference of `effect` leaves out zero."""
    return next(s for s in STUDENT if STUDENT[s] * spread / math.sqrt(s) < effect)


def seeds_normal(effect: float, spread: float) -> int:
    """Wrong: 1.96, as if the spread were known."""
    return next(s for s in STUDENT if 1.96 * spread / math.sqrt(s) < effect)


def seeds_no_root(effect: float, spread: float) -> int:
    """Wrong: the error of a mean is taken to fall with the number of seeds."""
    return next(s for s in STUDENT if STUDENT[s] * spread / s < effect)


def seeds_whole_width(effect: float, spread: float) -> int:
    """Wrong: the whole interval has to be shorter than the effect."""
    return next((s for s in STUDENT if 2 * STUDENT[s] * spread / math.sqrt(s) < effect), 21)


def seeds_spread_alone(effect: float, spread: float) -> int:
    """Wrong: the spread of one seed is taken for the error of the mean."""
    return next((s for s in STUDENT if STUDENT[s] * spread < effect), 21)


SAYS_OF_SEEDS = (
    (seeds_normal, "1.96 holds for a known spread. Yours comes from as few seeds: take Student's quantile."),
    (seeds_no_root, "The error of a mean falls with the square root of the number of seeds."),
    (seeds_whole_width, "Half of the interval lies below the mean: only that half has to be shorter than the effect."),
    (seeds_spread_alone, "That is the spread of a single seed: a mean of several spreads less."),
)


def check_seeds(answer: Any) -> str:
    """Compare at effects where each usual mistake gives a number of its own."""
    for effect, spread in ((2.0, 1.0), (1.0, 1.0), (2.0, 2.5)):
        right, found = seeds(effect, spread), answer(effect, spread)
        what = f"effect {effect:g}, spread {spread:g} from seed to seed: you say {found} seeds."
        for wrong, says in SAYS_OF_SEEDS:
            assert found == right or found != wrong(effect, spread), f"{what} {says}"
        assert found == right, (
            f"{what} Expected {right}: the first S for which STUDENT[S] x spread / sqrt(S) is below the effect."
        )
    return f"an effect as large as the spread takes {seeds(1, 1)} seeds, one of half the spread {seeds(0.5, 1)}."


# ---- 11.unfair

# Four arms against a base of 180 steps of one row of 65,536 tokens, all with seeds 0, 1 and 2.
DESIGNS: dict[str, dict[str, Any]] = {
    "A": {"scaling.method": "ntk", "scaling.beta": None},
    "B": {"stages": [{"to": 32768, "factor": 4, "steps": 240}, {"to": 65536, "factor": 8, "steps": 60}]},
    "C": {"stages": [{"to": 65536, "factor": 8, "steps": 180, "row": 8192}], "training.skip_positions_to": 65536},
    "D": {"rows.packing.mask_documents": True},
}


def design_of(name: str) -> Design:
    """One of the four designs, as the library reads it; `base` is what they are compared with."""
    shipped = load_study("smollm2-135m-64k").base
    base = replace(shipped, stages=(replace(shipped.stages[0], steps=180),))
    if name == "base":
        return base
    return changed(base, Arm(name, DESIGNS[name], "It differs.", Refutation(BEYOND, below=0)))


def tokens_of(design: Design) -> int:
    """Tokens that an arm trains on: steps times rows of a step times tokens of a row."""
    rows = design.training.get("global_batch_size", 1)
    return sum((stage.steps or 0) * rows * stage.length for stage in design.stages)


def check_unfair(answer: Any) -> str:
    """Say of a fair design why it is fair, and of the unfair one what it lacks."""
    answer = answer.strip().upper() if isinstance(answer, str) else answer
    assert answer in DESIGNS, f"Give one of {', '.join(DESIGNS)}, found {answer!r}."
    base, found = tokens_of(design_of("base")), tokens_of(design_of(answer))
    assert answer != "A", (
        "A is fair. It changes two keys and one decision: beta is YaRN's own, and means nothing to NTK."
    )
    assert answer != "B", (
        f"B is fair. It takes more steps, but half as long at first: {found:,} tokens, and the base {base:,}."
    )
    assert answer != "D", (
        "D is fair. A mask changes what a token sees, and with it the work; the tokens, seeds and samples are the same."
    )
    return (
        f"C trains on {found:,} tokens, the base on {base:,}. Rows of an eighth need eight of them a step, as in the "
        "shipped study."
    )


EXERCISES = (
    Exercise(
        name="11.refute",
        title="The number that refutes",
        task=(
            f"Hypothesis: {HYPOTHESIS} Give `refuted_if` as a dict: outcome, and either below or above. Differences "
            "are this arm minus the base, for perplexity in per cent."
        ),
        check=check_refute,
        solution=REFUTED,
        mistakes=(
            Mistake("above", {"outcome": BEYOND, "above": 2}, "it would confirm"),
            Mistake("zero", {"outcome": BEYOND, "below": 0}, "refutes nothing"),
            Mistake("a share", {"outcome": BEYOND, "below": 0.02}, "not in shares"),
            Mistake("sign", {"outcome": BEYOND, "below": -2}, "is no rise"),
            Mistake("another outcome", {"outcome": "perplexity", "below": 2}, "refute something else"),
            Mistake("both sides", {"outcome": BEYOND, "below": 2, "above": 2}, "A study refuses it"),
        ),
        hints=(
            "Which differences would make the sentence false?",
            "At least 2 is false below 2.",
        ),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="11.seeds",
        title="Seeds for an effect",
        task=(
            "Write `seeds(effect, spread)`: spread is the standard deviation of the paired difference from seed to "
            "seed. Give the fewest seeds, two or more, for which the interval around a found difference of `effect` "
            "leaves out zero. Half of the interval of S seeds is STUDENT[S] x spread / sqrt(S)."
        ),
        check=check_seeds,
        solution=seeds,
        mistakes=(
            Mistake("1.96", seeds_normal, "take Student's quantile"),
            Mistake("no root", seeds_no_root, "square root of the number"),
            Mistake("whole width", seeds_whole_width, "only that half"),
            Mistake("spread alone", seeds_spread_alone, "spread of a single seed"),
        ),
        hints=(
            "Try S = 2, 3, 4 ... until the half is shorter than the effect.",
            "next(s for s in STUDENT if ... < effect)",
        ),
        minutes=6,
    ),
    Exercise(
        name="11.unfair",
        title="The unfair one of four designs",
        task=(
            "Each of the four `DESIGNS` is compared with 180 steps of one row of 65,536 tokens, seeds 0, 1, 2, same "
            "samples. Give the letter of the one whose difference could not be put down to what it is about."
        ),
        check=check_unfair,
        solution="C",
        mistakes=(
            Mistake("two keys", "A", "one decision"),
            Mistake("more steps", "B", "half as long at first"),
            Mistake("more work", "D", "with it the work"),
        ),
        hints=(
            "Same tokens, same seeds, same samples, one decision: which of the four is broken?",
            "Multiply: steps x rows of a step x tokens of a row.",
        ),
        minutes=6,
    ),
)
