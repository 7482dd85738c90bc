"""Exercises of 08_one_gpu_run: a step's time from two others, learning rates from curves, what a resume needs."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.nb08_checks import (
    NEEDED,
    STATES,
    check_resume,
    check_step,
    check_triage,
    step_in_proportion,
    step_on_the_line,
    step_seconds,
    step_square_only,
    verdicts,
)

EXERCISES = (
    Exercise(
        name="08.step",
        title="The time of a step from two others",
        task=(
            "Write `step_seconds(tokens, measured)`: `measured` has the seconds of a step at two lengths. Give those "
            "at another length, within 25% of what was measured."
        ),
        check=check_step,
        solution=step_seconds,
        mistakes=(
            Mistake("in proportion", step_in_proportion, "grows with their square"),
            Mistake("square only", step_square_only, "Not all work is a square"),
            Mistake("straight line", step_on_the_line, "no square in it"),
            Mistake("a constant", lambda n, m: max(m.values()) * 3, "Solve a n + b n^2"),
        ),
        hints=(
            "Which work grows with the tokens, and which with their square?",
            "Divide both times by their tokens: s/n = a + b n is a straight line through two points.",
        ),
        minutes=8,
    ),
    Exercise(
        name="08.triage",
        title="Four learning rates from their curves",
        task=(
            'Give a dict with a verdict for each of the recorded curves A, B, C and D: "too low", "good", "too high" '
            'or "diverged".'
        ),
        check=check_triage,
        solution=verdicts("good", "diverged", "too low", "too high"),
        mistakes=(
            Mistake("smooth is good", verdicts("too high", "diverged", "good", "too high"), "hardly moves"),
            Mistake("B only too high", verdicts("good", "too high", "too low", "too high"), "it has diverged"),
            Mistake("D diverged", verdicts("good", "diverged", "too low", "diverged"), "does not run away"),
            Mistake("a list", ["good", "diverged"], "Give a dict"),
        ),
        hints=("Where does each start, and where does it end?", "Guessing among 512 words costs log(512) = 6.2 nats."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="08.resume",
        title="What a checkpoint needs",
        task=(
            "Give a set of what has to be saved so that a resumed run ends with the same bits, and nothing more. There "
            f"are: {', '.join(STATES)}."
        ),
        check=check_resume,
        solution=set(NEEDED),
        mistakes=(
            Mistake("weights only", {"parameters"}, "running mean of gradients starts from zero"),
            Mistake("no step", set(NEEDED) - {"step"}, "warm-up starts again"),
            Mistake("no random state", set(NEEDED) - {"random state"}, "drawn anew"),
            Mistake("all", set(STATES), "saved for nothing"),
        ),
        hints=(
            "Which variables does the loop read before it writes them?",
            "AdamW has three: two means and the number of steps.",
        ),
        minutes=6,
    ),
)
