"""Exercises of 10_evaluation."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.practice.nb10_budget import BUDGET
from ultralong.course.exercises.practice.nb10_checks import (
    check_match_part,
    check_paired,
    check_solve,
    check_unaverage,
    check_wilson,
    match_part_lm_eval,
    my_wilson,
    paired,
    paired_as_apart,
    paired_spread,
    paired_turned,
    solve,
    solve_dots,
    solve_example,
    solve_first_value,
    solve_one_hop,
    unaverage,
    unaverage_sum,
    wald,
    wilson_ninety,
    wilson_whole_width,
)


def part(answer: str, references: list[str]) -> float:
    """1 where any reference occurs in the answer, letter case aside."""
    return float(any(reference.lower() in answer.lower() for reference in references))


EXERCISES = (
    Exercise(
        name="10.solve",
        title="Three tests by regular expressions",
        task=(
            "Write `solve(task, text, prefix)`: task is infinitebench_kv_retrieval, ruler_vt or ruler_fwe, text the "
            "prompt, prefix the start of the answer. Give the answer as a string, by regular "
            "expressions and counting alone."
        ),
        check=check_solve,
        solution=solve,
        mistakes=(
            Mistake("any value", solve_first_value, "which key, which value"),
            Mistake("one hop", solve_one_hop, "follow it"),
            Mistake("the example's names", solve_example, "worked example"),
            Mistake("dots", solve_dots, "dots are noise"),
        ),
        hints=(
            "Print a sample of each test first, its beginning and its end.",
            "ruler_vt: find the value in the question, then the variable set to it, then those set from it, in order.",
            "ruler_fwe: collections.Counter over the words; the most frequent one is '...'.",
        ),
        minutes=15,
    ),
    Exercise(
        name="10.match_part",
        title="Score an answer with several references",
        task=(
            "Write `match_part(answer, references)` as RULER scores questions: 1.0 where any reference occurs in the "
            "answer, letter case aside, else 0.0."
        ),
        check=check_match_part,
        solution=part,
        mistakes=(
            Mistake("lm-eval's", match_part_lm_eval, "divide by the 3 references"),
            Mistake("letter case", lambda a, r: float(any(x in a for x in r)), "letter case does not count"),
            Mistake("equal", lambda a, r: float(a in r), "not to equal it"),
            Mistake("always", lambda a, r: 1.0, "holds no reference"),
        ),
        hints=("Lower both sides first.", "any(...) and float(...)."),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="10.wilson",
        title="An interval that holds at 20 of 20",
        task="Write `wilson(correct, n)`: the lower and upper end of Wilson's 95% interval, as shares from 0 to 1.",
        check=check_wilson,
        solution=my_wilson,
        mistakes=(
            Mistake("two errors", wald, "two errors is empty"),
            Mistake("90%", wilson_ninety, "90% interval"),
            Mistake("too wide", wilson_whole_width, "between 0 and 1"),
        ),
        hints=(
            "z = 1.96, p = correct / n.",
            "centre = (p + z^2/2n) / (1 + z^2/n); half = z / (1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2).",
        ),
        minutes=8,
    ),
    Exercise(
        name="10.paired",
        title="Two models on the same samples",
        task=(
            "Write `paired(first, second)`: scores of two models on the same samples, in the same order. Give the mean "
            "of second minus first and its standard error."
        ),
        check=check_paired,
        solution=paired,
        mistakes=(
            Mistake("apart", paired_as_apart, "take the differences first"),
            Mistake("turned", paired_turned, "second minus first"),
            Mistake("spread", paired_spread, "spread of one difference"),
        ),
        hints=("Subtract sample by sample first.", "The error of a mean is the spread (ddof=1) over sqrt(n)."),
        minutes=6,
    ),
    Exercise(
        name="10.unaverage",
        title="What a cumulative mean hides",
        task=(
            "Write `unaverage(to_128k, to_512k, to_1m)`: a paper gives means over all lengths from 4K up to 128K (six "
            "lengths, each twice the one before), up to 512K (eight) and up to 1M (nine). Give the mean of 256K and "
            "512K, and the score at 1M."
        ),
        check=check_unaverage,
        solution=unaverage,
        mistakes=(
            Mistake("as published", lambda a, b, c: (b, c), "means as published"),
            Mistake("sum of two", unaverage_sum, "half of it"),
            Mistake("as halves", lambda a, b, c: (unaverage(a, b, c)[0], 2 * c - b), "each as a ninth"),
        ),
        hints=(
            "A mean times its number of lengths is a sum.",
            "8 x (mean to 512K) - 6 x (mean to 128K) is two scores.",
        ),
        minutes=6,
    ),
    BUDGET,
)
