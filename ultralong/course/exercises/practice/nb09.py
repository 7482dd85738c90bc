"""Exercises of 09_sft: labels of a conversation, two means of a loss, what recorded results allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.presets import changed_preset
from ultralong.training.process_checks import process_problem

NOT_LEARNED = -100

# ---- 09.labels


def labels(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the next one where that is learned, else -100; the token at each `stop` ends the answer's turn."""
    learned = {place for start, stop in answers for place in range(start, stop + 1)}
    return [ids[t + 1] if t + 1 in learned else NOT_LEARNED for t in range(len(ids))]


def labels_of_all(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Wrong: the user's tokens are learned too."""
    return [*ids[1:], NOT_LEARNED]


def labels_without_end(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Wrong: the token that ends the turn is left out."""
    learned = {place for start, stop in answers for place in range(start, stop)}
    return [ids[t + 1] if t + 1 in learned else NOT_LEARNED for t in range(len(ids))]


def labels_shifted_twice(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Wrong: each token is to predict the one after the next."""
    once = labels(ids, answers)
    return [*once[1:], NOT_LEARNED]


def labels_not_shifted(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Wrong: each token is to predict itself."""
    learned = {place for start, stop in answers for place in range(start, stop + 1)}
    return [token if place in learned else NOT_LEARNED for place, token in enumerate(ids)]


def labels_of_last(ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Wrong: only the last answer of the conversation is learned."""
    return labels(ids, answers[-1:])


SAYS_OF_LABELS = (
    (labels_of_all, "The user's tokens are targets too: the model would learn to ask."),
    (labels_without_end, "The token that ends the turn is no target, so the model would never learn to stop."),
    (labels_shifted_twice, "Shifted twice: each token is to predict the one after the next."),
    (labels_not_shifted, "Not shifted: each token is to predict itself, which attention can copy."),
    (labels_of_last, "Earlier answers of the conversation are targets as well, not only the last."),
)


def check_labels(answer: Any) -> str:
    """Compare on a conversation of two turns, and on one that ends with its answer."""
    for ids, spans in (([1, 20, 21, 2, 30, 31, 3, 1, 22, 2, 32, 33, 34, 3, 9], [(4, 6), (10, 13)]),
                       ([1, 20, 2, 30, 3], [(3, 4)])):  # fmt: skip
        found = list(answer(list(ids), list(spans)))
        right = labels(ids, spans)
        assert len(found) == len(ids), f"Give one label for each of the {len(ids)} tokens; found {len(found)}."
        for wrong, says in SAYS_OF_LABELS:
            assert found != wrong(ids, spans) or found == right, f"{says} Tokens {ids}, labels {found}."
        assert found == right, f"Tokens {ids} with answers at {spans}: your labels are {found}, expected {right}."
    return "only answers are learned, each with the token that ends it."


# ---- 09.means

Examples = Sequence[tuple[Sequence[float], Sequence[int]]]


def means(examples: Examples) -> tuple[float, float]:
    """(mean over targets, mean over examples); an example is the loss of each token and 1 where it is a target."""
    sums = [sum(x for x, learned in zip(losses, mask, strict=True) if learned) for losses, mask in examples]
    counts = [sum(mask) for _, mask in examples]
    return sum(sums) / sum(counts), sum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums)


def means_swapped(examples: Examples) -> tuple[float, float]:
    """Wrong: the two are in the other order."""
    return means(examples)[1], means(examples)[0]


def means_alike(examples: Examples) -> tuple[float, float]:
    """Wrong: the mean over examples, twice."""
    return means(examples)[1], means(examples)[1]


def means_over_all(examples: Examples) -> tuple[float, float]:
    """Wrong: tokens without a loss are counted in the divisor."""
    return means([([x * m for x, m in zip(losses, mask, strict=True)], [1] * len(mask)) for losses, mask in examples])


def means_unmasked(examples: Examples) -> tuple[float, float]:
    """Wrong: the mask is ignored."""
    return means([(losses, [1] * len(mask)) for losses, mask in examples])


SAYS_OF_MEANS = (
    (means_swapped, "The first is to be the mean over targets, the second that over examples."),
    (means_alike, "Both are means of means: in the first one every target counts alike, so sum before you divide."),
    (means_over_all, "Divide by the number of targets: tokens without a loss are in your divisor."),
    (means_unmasked, "The prompt's losses are in it: only tokens whose mask is 1 count."),
)


def check_means(answer: Any) -> str:
    """Compare on one short and two longer answers."""
    examples = [([3.0, 1.0, 4.0], [0, 0, 1]), ([2.0, 1.0, 1.0, 0.5, 0.5], [0, 1, 1, 1, 1]), ([5.0, 2.0], [0, 1])]
    given, right = answer(examples), means(examples)
    assert hasattr(given, "__len__") and len(given) == 2, f"Give two numbers; found {given!r}."
    found = tuple(float(mean) for mean in given)
    for wrong, says in SAYS_OF_MEANS:
        same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, wrong(examples), strict=True))
        assert not same, f"{says} Yours: {found[0]:.3f} and {found[1]:.3f}."
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, right, strict=True)), (
        f"Expected {right[0]:.3f} over targets and {right[1]:.3f} over examples; found {found[0]:.3f}, {found[1]:.3f}."
    )
    return f"{right[0]:.3f} over targets, {right[1]:.3f} over examples: short answers weigh more in the second."


# ---- 09.claims

CLAIMS = {
    "A": "Held-out answers of the same kind became more probable to the model.",
    "B": "SFT improved the finding of needles beyond the old window.",
    "C": "SFT did the window no harm at all.",
    "D": "Needles beyond the old window did not fall by 20 points or more.",
    "E": "14 per cent more of the answers are right.",
    "F": "The model follows instructions of other kinds better.",
}
HOLDS = frozenset("AD")
WHY_NOT = {
    "B": "54 and 57 of 120 have 95% intervals of 36-54% and 39-56%: no difference can be told.",
    "C": "No difference found is not no difference: these numbers allow a loss of ten points as well.",
    "E": "-0.144 is in nats per token of the answer, not in right answers: nobody judged whether one is right.",
    "F": "The held-out answers come from the same source; of other kinds nothing was measured.",
}
WHY_SO = {
    "A": "The interval of the change, -0.154 to -0.134, lies far from zero, over 400 held-out conversations.",
    "D": "The difference is +2.5 points with an interval of about -10 to +15: a fall of 20 lies outside.",
}


def check_claims(answer: Any) -> str:
    """Compare with what the two recorded results allow."""
    given = set(answer) if isinstance(answer, set | frozenset | list | tuple | str) else {answer}
    assert given <= set(CLAIMS), f"Give a set of letters from A to F; found {answer!r}."
    for letter in sorted(given - HOLDS):
        raise AssertionError(f"{letter}, {CLAIMS[letter]!r}: {WHY_NOT[letter]}")
    for letter in sorted(HOLDS - given):
        raise AssertionError(f"{letter}, {CLAIMS[letter]!r}, can be said. {WHY_SO[letter]}")
    return "answers became likelier; of the window one can only say how much it did not lose."


# ---- 09.batch

PRESET, GPUS, EXAMPLES, EPOCHS = "llama31-8b-sft", 8, 128, 2
REPORT = {"documents": 30_000, "rows": 7_500, "length": 8192}  # of rows that are not those of the paper
CHANGES = {"global_batch_size": 32, "steps": 469}


def check_batch(answer: Any) -> str:
    """Load the preset with the changes, as `--set` would, and count examples, epochs and processes."""
    plain, config = changed_preset(PRESET, {}), changed_preset(PRESET, answer)
    problem = process_problem(config, GPUS)
    assert problem is None, f"{GPUS} GPUs can't start it. The trainer says: {problem}"
    rate, usual = config.optimizer.lr, plain.optimizer.lr
    assert rate == usual, (
        f"The learning rate is {rate:g}: as many examples a step as before ask for {usual:g}, as before."
    )
    held = REPORT["documents"] / REPORT["rows"]
    examples = config.global_batch_size * held
    assert math.isclose(examples, EXAMPLES), (
        f"{config.global_batch_size} rows of {held:g} conversations are {examples:g} examples a step, not {EXAMPLES}."
    )
    epochs = config.steps * config.global_batch_size / REPORT["rows"]
    assert math.isclose(epochs, EPOCHS, rel_tol=0.005), (
        f"{config.steps} steps of {config.global_batch_size} rows read the {REPORT['rows']:,} rows {epochs:.2f} times, "
        f"not {EPOCHS}."
    )
    assert config.length == plain.length, f"The rows have {plain.length:,} tokens: length was right."
    return f"{examples:g} examples a step, {epochs:.2f} epochs in {config.steps} steps; {GPUS} GPUs start it."


EXERCISES = (
    Exercise(
        name="09.labels",
        title="The labels of a conversation",
        task=(
            "Write `labels(ids, answers)`: ids are a conversation's tokens, answers a list of (start, stop), the "
            "places of each answer's text; the token at `stop` ends its turn. Give a list of one label a token, "
            "shifted by one: the next token where that is to be learned, else -100."
        ),
        check=check_labels,
        solution=labels,
        mistakes=(
            Mistake("user tokens", labels_of_all, "learn to ask"),
            Mistake("no turn end", labels_without_end, "never learn to stop"),
            Mistake("shifted twice", labels_shifted_twice, "Shifted twice"),
            Mistake("not shifted", labels_not_shifted, "Not shifted"),
            Mistake("last answer only", labels_of_last, "not only the last"),
        ),
        hints=(
            "First mark which tokens are to be produced: each answer, and the token behind it.",
            "The label at place t is ids[t + 1], if the token at t + 1 is marked.",
        ),
        minutes=8,
    ),
    Exercise(
        name="09.means",
        title="Mean over targets, mean over examples",
        task=(
            "Write `means(examples)`: an example is (losses, mask), one number a token, mask 1 on targets. Give the "
            "mean over all targets, and the mean of the examples' own means."
        ),
        check=check_means,
        solution=means,
        mistakes=(
            Mistake("swapped", means_swapped, "The first is to be the mean over targets"),
            Mistake("mean of means twice", means_alike, "sum before you divide"),
            Mistake("divided by all tokens", means_over_all, "in your divisor"),
            Mistake("no mask", means_unmasked, "whose mask is 1"),
        ),
        hints=(
            "You need each example's sum of losses and its number of targets.",
            "The first is the sum of the sums over the sum of the numbers.",
        ),
        difficulty="easy",
        minutes=6,
    ),
    Exercise(
        name="09.batch",
        title="A preset for your own rows",
        task=(
            f"Your rows of 8,192 tokens hold 30,000 conversations in 7,500 rows. Give the changes of the preset "
            f"{PRESET}, a dict as --set takes it, so that a step has the paper's 128 examples, the rows are read "
            "twice, and 8 GPUs start it. The check loads the preset with them."
        ),
        check=check_batch,
        solution=CHANGES,
        mistakes=(
            Mistake("as it is", {}, "64 examples a step, not 128"),
            Mistake("rows for examples", {**CHANGES, "global_batch_size": 128}, "are 512 examples a step"),
            Mistake("steps of before", {"global_batch_size": 32}, "2.05 times"),
            Mistake("a larger rate too", {**CHANGES, "optimizer.lr": 1e-5}, "as before"),
            Mistake("another key", {**CHANGES, "batch": 32}, "The trainer refuses it"),
        ),
        hints=(
            "How many conversations does one row hold? The preset's first lines say what to do with it.",
            "128 over that are the rows of a step; twice all rows over the rows of a step are the steps.",
        ),
        minutes=6,
    ),
    Exercise(
        name="09.claims",
        title="What may be said of two results",
        task=(
            "SFT changed the loss of held-out answers by -0.144 nats (-0.154 to -0.134), and needles beyond the "
            "old window from 54 to 57 of 120. Give the set of letters of `CLAIMS` that follow."
        ),
        check=check_claims,
        solution=set(HOLDS),
        mistakes=(
            Mistake("three more needles", {"A", "B", "D"}, "no difference can be told"),
            Mistake("no harm", {"A", "C", "D"}, "is not no difference"),
            Mistake("nats as per cent", {"A", "D", "E"}, "in nats per token"),
            Mistake("other kinds", {"A", "D", "F"}, "from the same source"),
            Mistake("nothing of the window", {"A"}, "a fall of 20 lies outside"),
        ),
        hints=(
            "For each claim: what was measured, on what, and does the interval hold the value that it denies?",
            "The difference of two shares of 120 has an interval of about 12 points to each side.",
        ),
        minutes=6,
    ),
)
