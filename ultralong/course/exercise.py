"""An exercise of the course: a task, a check that teaches, hints, one solution, and the mistakes that people make.

The mistakes are there for the tests: every one has to fail its check with its own hint, so that a check which lets a
wrong answer pass, or says something unhelpful about it, is found before a learner finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

# Notebooks that have exercises, by the number that starts their exercises' names: a folder for each part of the course.
PARTS = {
    "foundations": ("00", "01", "02", "03", "04"),
    "machinery": ("05", "06", "07", "08"),
    "practice": ("09", "10", "11", "12", "13"),
}


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, and what the check says about it.

    Attributes:
        name: What is wrong with it, in a few words.
        answer: The wrong answer: a function or a value, as a learner would give it.
        says: Text that the check's message must contain.
    """

    name: str
    answer: Any
    says: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        name: Number of the notebook and a word: `01.wavelength`.
        title: What it is about, in a few words.
        task: What to write, with the signature, units and shapes.
        check: From the learner's answer to the sentence that is printed when it is right. It raises AssertionError
            with a message that says what was found, what was expected and where to look.
        solution: One right answer.
        mistakes: Wrong answers with what the check says of each; three or more.
        hints: From a nudge to nearly the solution.
        difficulty: Rough level.
        minutes: Rough time.
    """

    name: str
    title: str
    task: str
    check: Callable[[Any], str]
    solution: Any
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    minutes: int = 5

    @property
    def notebook(self) -> str:
        """The two digits that the notebook's file name starts with."""
        return self.name.partition(".")[0]


@dataclass
class _Registry:
    found: dict[str, Exercise] = field(default_factory=dict)

    def load(self) -> dict[str, Exercise]:
        if not self.found:
            for part, numbers in PARTS.items():
                for number in numbers:
                    module = importlib.import_module(f"ultralong.course.exercises.{part}.nb{number}")
                    self.found |= {exercise.name: exercise for exercise in module.EXERCISES}
        return self.found


_REGISTRY = _Registry()


def exercises(notebook: str | None = None) -> list[Exercise]:
    """All exercises in the order of the course, or those of one notebook.

    Args:
        notebook: The notebook's number or name, such as `01` or `01_rope_frequencies`; None takes all.
    """
    found = list(_REGISTRY.load().values())
    return found if notebook is None else [each for each in found if each.notebook == notebook[:2]]


def exercise(name: str) -> Exercise:
    """The exercise of a name.

    Raises:
        ValueError: There is none; the message lists those of the same notebook.
    """
    known = _REGISTRY.load()
    if name not in known:
        near = [each for each in known if each[:2] == name[:2]] or list(known)
        raise ValueError(f"There is no exercise {name!r}. There are: {', '.join(near)}.")
    return known[name]
