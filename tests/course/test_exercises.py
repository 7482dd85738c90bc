"""Exercises tested by mutation: the solution passes, and every stored mistake fails with its own hint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ultralong import course
from ultralong.course import checks, progress
from ultralong.course.exercise import exercises

ALL = exercises()
DEAR = ("01.largest_position", "06.all_to_all", "06.ring", "10.solve")  # each try costs half a second or more
MISTAKES = [(task, mistake) for task in ALL for mistake in task.mistakes]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No course folder, no hints shown, nothing remembered of the test before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_SESSION", progress.Progress())
    monkeypatch.setattr(checks, "_HINTS_SHOWN", {})


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_the_solution_passes_and_an_exercise_is_whole(task, capsys):
    course.check(task.name, task.solution)
    assert capsys.readouterr().out.startswith(f"ok {task.name}: ")
    assert len(task.mistakes) >= 3
    assert len({mistake.says for mistake in task.mistakes}) == len(task.mistakes)
    assert len(task.hints) >= 2
    assert task.task
    assert task.title


@pytest.mark.parametrize(("task", "mistake"), MISTAKES, ids=[f"{t.name}: {m.name}" for t, m in MISTAKES])
def test_a_mistake_fails_with_its_own_hint(task, mistake):
    with pytest.raises(AssertionError) as error:
        course.check(task.name, mistake.answer)
    assert mistake.says in str(error.value)
    assert str(error.value).startswith(f"{task.name}: not yet. ")


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_what_was_not_tried_passes_and_says_so(task, capsys):
    unfinished = [lambda *a, **k: None, lambda *a, **k: ...] if callable(task.solution) else []
    for answer in (None, ..., *unfinished):
        course.check(task.name, answer)
        assert f"{task.name}: not tried yet" in capsys.readouterr().out


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_an_answer_of_another_kind_gets_a_hint_and_no_other_error(task):
    odd = ("7",) if task.name in DEAR else ("7", object(), -1, np.ones(3), torch.ones(2, 3))
    for value in odd:
        answer = (lambda *_, value=value, **__: value) if callable(task.solution) else value
        with pytest.raises(checks.NotYet) as error:
            course.check(task.name, answer)
        assert str(error.value).startswith(f"{task.name}: not yet. ")


def test_an_error_in_the_answer_is_told_with_its_call_and_without_frames():
    with pytest.raises(checks.NotYet, match="Your function raised ZeroDivisionError") as error:
        course.check("01.wavelength", lambda *_: 1 / 0)
    assert "It was called with (" in str(error.value)
    assert error.value._render_traceback_() == [str(error.value)], "IPython would show the check's own frames"


def test_an_unfinished_function_is_not_an_error(capsys):
    def later(*arguments):
        raise NotImplementedError

    course.check("01.wavelength", later)
    assert "not tried yet" in capsys.readouterr().out


def test_hints_come_one_by_one_and_then_the_solution(capsys):
    task = course.exercise("01.wavelength")
    for number, text in enumerate(task.hints, 1):
        course.hint(task.name)
        assert capsys.readouterr().out == f"{task.name}, hint {number} of {len(task.hints)}: {text}\n"
    course.hint(task.name)
    assert "solution('01.wavelength')" in capsys.readouterr().out
    course.solution(task.name)
    assert "2 * math.pi * base" in capsys.readouterr().out


def test_predictions_are_taken_and_revealed(capsys):
    course.predict("01.never_turn", ["8", "29", "45"])
    assert "your guess?" in capsys.readouterr().out
    assert course.reveal("01.never_turn", "29") is None
    course.predict("01.never_turn", ["8", "29", "45"], guess="29")
    assert course.reveal("01.never_turn", "29", "It is less than half.") is True
    assert "29 (as you guessed). It is less than half." in capsys.readouterr().out
    course.predict("01.never_turn", ["8", "29", "45"], guess="8")
    assert course.reveal("01.never_turn", "29") is False
    with pytest.raises(ValueError, match="'7' is not one of"):
        course.predict("01.never_turn", ["8", "29"], guess="7")


def test_progress_is_kept_in_a_course_folder_and_nowhere_else(tmp_path, monkeypatch):
    course.check("01.wavelength", course.exercise("01.wavelength").solution)
    assert list(tmp_path.iterdir()) == []
    progress.Progress(tmp_path / progress.FILE).save()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    task = course.exercise("01.never")
    with pytest.raises(AssertionError):
        course.check(task.name, task.mistakes[0].answer)
    course.check(task.name, task.solution)
    kept = progress.load()
    assert set(kept.solved) == {task.name}
    assert kept.tried == {task.name: 1}
    (tmp_path / progress.FILE).write_text('{"other": 1}')
    with pytest.raises(ValueError, match="not a file of the course"):
        progress.load()


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match=r"There are: 01\.wavelength"):
        course.check("01.wavelenght", 1)
