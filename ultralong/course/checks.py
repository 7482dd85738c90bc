"""Check, hint, solution, prediction: what a cell of a notebook calls.

An exercise that nobody tried yet passes, so that "Run all" gets to the end. A wrong answer raises an AssertionError
that says what was found and where to look; a notebook shows that message alone. A right one prints one line.
"""

from __future__ import annotations

import datetime
import html
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ultralong.course import progress
from ultralong.course.exercise import exercise

_HINTS_SHOWN: dict[str, int] = {}
_SESSION = progress.Progress()


class NotTried(Exception):
    """The learner's function still returns what the notebook put there."""


class NotYet(AssertionError):
    """A wrong answer; the message is for the learner."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: frames of the check would say nothing to a learner."""
        return [str(self)]


class Tried:
    """A learner's function as the checks call it: an unfinished one is told apart, an error is explained.

    Args:
        function: What the learner wrote.

    Attributes:
        given: What it returned last.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.given: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The function's result.

        Raises:
            NotTried: It returns None or `...`, or raises NotImplementedError.
            AssertionError: It raises anything else; the message shows the call.
        """
        try:
            result = self.function(*arguments, **named)
        except NotImplementedError as error:
            raise NotTried from error
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(
                f"Your function raised {type(error).__name__}: {error}{_line_of(error)}. It was called with "
                f"{_shown(arguments, named)}."
            ) from error
        if result is None or result is ...:
            raise NotTried
        if isinstance(result, np.generic):  # a whole number of numpy's is one too
            result = result.item()
        self.given = result
        return result


def check(name: str, answer: Any = None) -> None:
    """Check an exercise and print one line.

    Args:
        name: The exercise, such as `01.wavelength`.
        answer: The learner's function or value; None and `...` are "not tried yet", and so is a function that returns
            one of them.

    Raises:
        ValueError: There is no such exercise.
        NotYet: The answer is wrong; the message says what was found, what was expected and where to look.
    """
    task = exercise(name)
    if callable(answer) and not callable(task.solution):
        raise _wrong(name, f"Give a value, not a function. What is asked for: {task.task}")
    tried = Tried(answer) if callable(answer) else answer
    try:
        if answer is None or answer is ...:
            raise NotTried
        said = task.check(tried)
    except NotTried:
        print(f"{name}: not tried yet. {task.title}, about {task.minutes} minutes.")
        print(textwrap.fill(_asked(task.task, answer), 110))
        print(
            f"Write your answer in this cell and run it again. Stuck? from ultralong.course import hint; hint({name!r})"
        )
        return
    except AssertionError as error:
        raise _wrong(name, str(error)) from error.__cause__
    except Exception as error:  # the check cannot compute with what was given: another type, or another shape
        given = tried.given if isinstance(tried, Tried) else tried
        said = "what your function gave" if given is None else f"{_short(given)}{_kind(given)}"  # None: on another rank
        raise _wrong(
            name,
            f"The check cannot use {said}: {type(error).__name__}: {error}. "
            f"What is asked for: {_asked(task.task, answer)}",
        ) from error
    record = _progress()
    record.solved.setdefault(name, datetime.date.today().isoformat())
    record.save()
    print(f"ok {name}: {said}")


def _asked(task: str, answer: Any) -> str:
    """What an exercise asks for, with the function's name as the learner's cell has it."""
    named = getattr(answer, "__name__", "")
    return re.sub(r"(?<=^Write `)\w+(?=\()", named, task) if named.isidentifier() else task


def _wrong(name: str, message: str) -> NotYet:
    """Count a wrong answer, and return the error that says why."""
    record = _progress()
    record.tried[name] = record.tried.get(name, 0) + 1
    record.save()
    return NotYet(f"{name}: not yet. {message}")


def hint(name: str) -> None:
    """Print the next hint of an exercise; after the last one, how to see a solution.

    Raises:
        ValueError: There is no such exercise.
    """
    task = exercise(name)
    at = _HINTS_SHOWN.get(name, 0)
    if at >= len(task.hints):
        print(
            f"{name}: these were all the hints. A solution: from ultralong.course import solution; solution({name!r})"
        )
        return
    _HINTS_SHOWN[name] = at + 1
    print(f"{name}, hint {at + 1} of {len(task.hints)}: {task.hints[at]}")


def solution(name: str) -> None:
    """Show one right answer, folded away in a notebook and printed elsewhere.

    Raises:
        ValueError: There is no such exercise.
    """
    text = solution_text(name)
    shell = _ipython()
    if shell is None:
        print(text)
        return
    folded = f"<details><summary>One solution of {html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
    shell.display.display({"text/html": folded, "text/plain": text}, raw=True)


def solution_text(name: str) -> str:
    """The source of one right answer, or the value where the answer is one."""
    answer = exercise(name).solution
    return textwrap.dedent(inspect.getsource(answer)).rstrip() if callable(answer) else repr(answer)


def predict(name: str, options: Sequence[str], guess: str | None = None) -> None:
    """Take a guess before the cell that shows the answer; `reveal` says later whether it was right.

    Args:
        name: The prediction's name, such as `01.never_turn`.
        options: What can be guessed.
        guess: One of them; None passes.

    Raises:
        ValueError: The guess is not among the options.
    """
    if guess is None:
        print(f"{name}: your guess? One of {', '.join(map(repr, options))}. Set guess= and run the cell again.")
        return
    if guess not in options:
        raise ValueError(f"{name}: {guess!r} is not one of {', '.join(map(repr, options))}.")
    record = _progress()
    record.guesses[name] = guess
    record.save()
    print(f"{name}: you guess {guess!r}. The answer comes below.")


def reveal(name: str, answer: str, why: str = "") -> bool | None:
    """Say whether a prediction was right.

    Args:
        name: The prediction's name.
        answer: The right option, computed by the notebook.
        why: A sentence that explains it.

    Returns:
        Whether the guess was right; None where there was none.
    """
    record = _progress()
    guess = record.guesses.get(name)
    right = None if guess is None else guess == answer
    verdict = {None: "no guess was made", True: "as you guessed", False: f"you guessed {guess!r}"}[right]
    print(f"{name}: {answer} ({verdict}).{' ' + why if why else ''}")
    if right is not None:
        record.outcomes[name] = right
        record.save()
    return right


def _progress() -> progress.Progress:
    """The course folder's progress, or what this process remembers outside of one."""
    found = progress.load()
    return _SESSION if found.path is None else found


def _ipython() -> Any:
    """IPython, where a notebook or its shell runs this; else None."""
    try:
        import IPython
    except ImportError:  # a library user without the notebooks' packages
        return None
    return IPython if IPython.get_ipython() is not None else None


def _line_of(error: Exception) -> str:
    """Where in the learner's code an error came up, by the last line of a notebook's cell in its traceback."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "ipykernel" in frame.filename]
    return f" (line {lines[-1].lineno} of the cell: {lines[-1].line})" if lines else ""


def _kind(value: Any) -> str:
    """The type of a value whose text does not say it."""
    return "" if getattr(value, "shape", ()) else f", a value of type {type(value).__name__}"


def _shown(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    parts = [_short(value) for value in arguments] + [f"{key}={_short(value)}" for key, value in named.items()]
    return f"({', '.join(parts)})"


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = (
        f"{type(value).__name__} of shape {tuple(shape)}"
        if shape is not None and len(shape)
        else " ".join(repr(value).split())
    )
    return text if len(text) <= 80 else text[:77] + "..."
