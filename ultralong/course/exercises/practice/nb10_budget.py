"""The exercise of 10_evaluation that plans an evaluation: which tests, how many samples, within a budget."""

from __future__ import annotations

from typing import Any

from ultralong.course.exercise import Exercise, Mistake
from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.tasks.samples import find_task

SECONDS, GPUS = 267.5, 2  # of one prompt of a million tokens: notebooks/results/serve_1m_2gpu.json
HOURS = 24.0  # there are two H200s for so long
WIDEST = 0.30  # of an interval at one half
# What a plan has to ask for, and the beginnings of the names of tests that do.
KINDS = {
    "one needle among others": ("niah_multi",),
    "following or counting over the whole text": ("ruler_vt", "ruler_cwe", "ruler_fwe"),
    "chained facts": ("babilong_style_qa2", "babilong_style_qa3"),
    "a question that shares no word with its sentence": ("nonliteral",),
}
PLAN = {"niah_multikey_2": 60, "ruler_vt": 60, "babilong_style_qa2": 60, "nonliteral_world": 60}


def check_budget(answer: Any) -> str:
    """Each kind of question is asked, each test often enough, and all of it ends in time."""
    assert isinstance(answer, dict) and answer, f"Give a dict from tests to numbers of samples; found {answer!r}."
    for name, samples in answer.items():
        try:
            find_task(name)
        except ValueError as error:
            raise AssertionError(str(error)) from error
        assert isinstance(samples, int) and samples > 0, f"{name}: {samples!r} is no number of samples."
    for kind, begins in KINDS.items():
        assert any(name.startswith(begins) for name in answer), (
            f"Nothing asks for {kind}. A model that fails at it alone would look whole. Such tests begin with "
            f"{' or '.join(begins)}."
        )
    hours = sum(answer.values()) * SECONDS / 3600
    assert hours <= HOURS, (
        f"{sum(answer.values())} prompts of {SECONDS:.0f} s take {hours:.0f} hours, and there are {HOURS:.0f}. Which "
        "tests ask for the same thing twice, and how narrow has an interval to be?"
    )
    for name, samples in answer.items():
        low, high = wilson(samples // 2, samples)
        assert high - low <= WIDEST, (
            f"{name}: {samples // 2} of {samples} right would say {low:.0%} to {high:.0%}, {100 * (high - low):.0f} "
            f"points wide. With at most {100 * WIDEST:.0f} a fall from 70 to 30 per cent is seen."
        )
    low, high = wilson(min(answer.values()) // 2, min(answer.values()))
    return (
        f"{len(answer)} tests, {sum(answer.values())} prompts in {hours:.1f} hours of {GPUS} GPUs; intervals are at "
        f"most {100 * (high - low):.0f} points wide."
    )


BUDGET = Exercise(
    name="10.budget",
    title="An evaluation at a million tokens",
    task=(
        "Two H200s are yours for 24 hours, and read one prompt of a million tokens in 267.5 s. Give a plan, a dict "
        "from tests to samples, that asks for one needle among others, for following or counting, for chained "
        "facts, and non-literally. No 95% interval at one half may be wider than 30 points."
    ),
    check=check_budget,
    solution=PLAN,
    mistakes=(
        Mistake("needles only", {"niah_single_1": 100, "niah_multikey_1": 100}, "Nothing asks for following"),
        Mistake("RULER's 500", dict.fromkeys(PLAN, 500), "hours, and there are 24"),
        Mistake("a few of each", dict.fromkeys(PLAN, 20), "points wide"),
        Mistake("an unknown test", {"needles": 50}, "needles"),
        Mistake("a list", list(PLAN), "Give a dict from tests"),
    ),
    hints=(
        "How many prompts fit into 24 hours? Divide them among as few tests as the task allows.",
        "The figure of Wilson's widths says how many samples an interval of 30 points takes.",
    ),
    minutes=8,
)
