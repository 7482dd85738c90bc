"""Exercises tested by mutation: the solution passes, and every stored mistake fails with its own hint."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ultralong import course
from ultralong.course import checks, progress
from ultralong.course.exercise import exercises

ALL = exercises()
DEAR = (
    "00.settings",
    "01.largest_position",
    "06.all_to_all",
    "06.ring",
    "10.solve",
)  # each try costs half a second or more
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


def right(name, change):
    """A right answer in another form."""
    return lambda *given: change(course.exercise(name).solution(*given))


def packed_with_the_end_kept(documents, separator, length):
    """As the notebook's own ten lines pack, whose last row has a target of -100 where the stream ends with it."""
    stream = [token for number, ids in enumerate(documents) for token in (separator if number else []) + ids]
    after = [*stream[1:], -100]
    starts = range(0, len(stream) - length + 1, length)
    return [(stream[at : at + length], after[at : at + length]) for at in starts]


OTHER_FORMS = (
    ("00.wilson", right("00.wilson", np.array)),
    ("01.repair", {"rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192}),
    ("01.largest_position", 262144.0),
    ("03.pack", packed_with_the_end_kept),
    ("04.keep", right("04.keep", np.int64)),
    ("05.flops", lambda lengths, heads, size: sum(3.5 * 4 * n * (n + 1) / 2 * heads * size for n in lengths)),
    ("06.zigzag", lambda rank, ranks: [2 * ranks - 1 - rank, rank]),
    ("09.batch", {"global_batch_size": 32, "steps": 468, "optimizer.lr": 5e-6}),
    ("09.claims", "AD"),
    ("09.means", right("09.means", torch.tensor)),
    ("11.unfair", "c"),
    ("12.dead", right("12.dead", np.int64)),
    ("12.mesh", right("12.mesh", list)),
    ("13.repair", {"max_position_embeddings": 2**20, "rope_type": "llama3", "factor": 128.0,
                   "original_max_position_embeddings": 8192, "model_max_length": 2**20}),
)  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), OTHER_FORMS, ids=[name for name, _ in OTHER_FORMS])
def test_a_right_answer_in_another_form_passes(name, answer, capsys):
    course.check(name, answer)
    assert capsys.readouterr().out.startswith(f"ok {name}: ")


def test_a_function_where_a_value_is_asked_for_is_said():
    with pytest.raises(checks.NotYet, match="Give a value, not a function"):
        course.check("01.largest_position", lambda: 262144)


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


def test_the_list_of_exercises_stays_a_function_when_they_are_loaded():
    """Their package has the same name, and would take its place at the first check."""
    code = "from ultralong import course; course.check('00.factor'); print(len(course.exercises('00')))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "4"


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match=r"There are: 01\.wavelength"):
        course.check("01.wavelenght", 1)
