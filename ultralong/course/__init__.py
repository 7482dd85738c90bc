"""The course: exercises that check themselves, predictions, and the folder a learner works in.

A notebook calls `predict`, `reveal`, `check`, `hint` and `solution`; `ultralong course start` copies the notebooks into
a folder of the learner's own and `ultralong course check` shows how far it got.
"""

# First, so that the function of the same name below stays what the name means: a package names its parts when they are
# imported, and this one would be at the first check.
import ultralong.course.exercises  # noqa: F401
from ultralong.course.checks import check, hint, predict, reveal, solution
from ultralong.course.exercise import Exercise, Mistake, exercise, exercises

__all__ = ["Exercise", "Mistake", "check", "exercise", "exercises", "hint", "predict", "reveal", "solution"]
