"""Notebook tooling, on small notebooks written here: what is kept, what is taken out, and which faults are found."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from ultralong.notebook_tools import store, stored
from ultralong.notebook_tools.__main__ import main
from ultralong.notebook_tools.rules import MOST_KILOBYTES, violations
from ultralong.notebook_tools.run import chosen_parameters, clean, execute, parameter_names, read_source, write_notebook
from ultralong.notebook_tools.settings import Settings, load_settings, sources

SOURCE = """\
# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Waves
# **At a glance**
#
# | CPU | GPU |
# |---|---|
# | 5 s | - |
#
# Before this: [one](01_one.ipynb). After this: [three](03_three.ipynb).

# %% tags=["parameters"]
POINTS: int = 3  # how many points to draw
INTERACTIVE: bool = True  # sliders need a running kernel
NAME: str = "wave"  # printed in the title

# %%
import sys
from pathlib import Path

from IPython.display import display
from tqdm import tqdm

from ultralong.notebook_tools import store

for _ in tqdm(range(POINTS)):
    pass
print(NAME, POINTS, INTERACTIVE, Path.cwd())

# %%
still = "iVBORw0KGgo="
display({"application/vnd.plotly.v1+json": {"data": [], "layout": {}}, "image/png": still,
         "text/plain": "A wave that rises once and falls once."}, raw=True)

# %% [markdown]
# **What you should see**: a wave.

# %% tags=["check"]
assert POINTS > 0, "a wave needs a point"
store(points=POINTS)

# %%
POINTS + 1
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three notebooks whose middle one is the sample."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name in ("01_one", "03_three"):
        (notebooks / f"{name}.py").write_text("# %%\n1 + 1\n")
    (notebooks / "02_two.py").write_text(SOURCE)
    (notebooks / "ci.yml").write_text(
        "defaults: {timeout: 60, parameters: {INTERACTIVE: false, ABSENT: 1}}\n"
        "02_two: {parameters: {POINTS: 5}, expect: {points: [5, 5]}}\n"
    )
    return notebooks


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The sample, executed once and cleaned; with its source, in a folder that stays."""
    notebooks = tmp_path_factory.mktemp("clone") / "notebooks"
    notebooks.mkdir()
    for name in ("01_one", "02_two", "03_three"):
        (notebooks / f"{name}.py").write_text(SOURCE)
    path = notebooks / "02_two.py"
    return execute(path, {"POINTS": 5, "INTERACTIVE": False}, timeout=60), path


OK = Settings(timeout=60, expect={"points": (5, 5)})


def outputs(notebook) -> str:
    return "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)


def test_a_sound_notebook_breaks_no_rule(executed):
    assert violations(*executed, OK) == []


def test_parameters_arrive_and_leave_no_cell_behind(executed):
    notebook, path = executed
    assert "wave 5 False notebooks" in outputs(notebook)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in read_source(path).cells]
    assert stored(notebook) == {"points": 5}


def test_text_that_came_in_pieces_is_kept_as_one(folder):
    source = read_source(folder / "01_one.py")
    ran = copy.deepcopy(source)
    pieces = [("stdout", "a\n"), ("stdout", "b\n"), ("stderr", "odd\n"), ("stdout", "c\n")]
    ran.cells[0].outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    kept = clean(ran, source, folder).cells[0].outputs
    assert [(each.name, each.text) for each in kept] == [("stdout", "a\nb\n"), ("stderr", "odd\n"), ("stdout", "c\n")]


def test_nothing_of_the_moment_is_kept(executed):
    notebook, path = executed
    text = nbformat.writes(notebook)
    assert str(path.parents[1]) not in text
    assert not re.search(r"papermill|iopub|\d{4}-\d\d-\d\dT|it/s|injected", text)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.language == "python"
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3, 4, 5]


def test_two_runs_write_the_same_bytes(executed, tmp_path):
    notebook, path = executed
    write_notebook(notebook, tmp_path / "first.ipynb")
    write_notebook(execute(path, {"POINTS": 5, "INTERACTIVE": False}, timeout=60), tmp_path / "second.ipynb")
    assert (tmp_path / "first.ipynb").read_bytes() == (tmp_path / "second.ipynb").read_bytes()


def code_cell(notebook, text):
    return next(cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)


def figure(notebook):
    return code_cell(notebook, "still").outputs[0].data


def stream(name: str, text: str):
    return nbformat.v4.new_output("stream", name=name, text=text)


FAULTS = {
    "is not what its percent source says": lambda book: book.cells[0].update(source="# Other"),
    "holds an error, ValueError": lambda book: code_cell(book, "still").outputs.append(
        nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    ),
    "standard error": lambda book: code_cell(book, "still").outputs.append(stream("stderr", "FutureWarning: old")),
    "without a still picture": lambda book: figure(book).pop("image/png"),
    "without a sentence": lambda book: figure(book).update({"text/plain": "Figure({'data': []})"}),
    "holds a widget": lambda book: figure(book).update({"application/vnd.jupyter.widget-view+json": {}}),
    "belongs to one session: widgets": lambda book: book.metadata.update(widgets={}),
    "shows something of the machine": lambda book: code_cell(book, "still").outputs.append(
        stream("stdout", "saved to /mnt/disk/model")
    ),
    "was not executed": lambda book: code_cell(book, "still").update(execution_count=None),
    "kB; at most": lambda book: figure(book).update({"image/png": "A" * MOST_KILOBYTES * 1000}),
    "another kernelspec": lambda book: book.metadata.kernelspec.pop("language"),
    "did not store points": lambda book: code_cell(book, "assert").update(outputs=[]),
}


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_of_an_executed_file_is_found(executed, message):
    notebook, path = copy.deepcopy(executed[0]), executed[1]
    FAULTS[message](notebook)
    assert message in "\n".join(violations(notebook, path, OK))


def test_a_stored_value_outside_its_bounds_is_found(executed):
    wrong = violations(*executed, Settings(timeout=60, expect={"points": (6, 9)}))
    assert wrong == ["stored points = 5; ci.yml expects 6 to 9."]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# # Waves", "# Waves", "has 0 titles"),
        ("**At a glance**", "Times", "no 'At a glance' table"),
        ("What you should see", "Look", "never says 'What you should see'"),
        ("(01_one.ipynb)", "(missing.ipynb)", "links to missing.ipynb, which does not exist"),
        ("(01_one.ipynb)", "(03_three.ipynb)", "does not link to the previous notebook, 01_one.ipynb"),
        ("(03_three.ipynb)", "(01_one.ipynb)", "does not link to the next notebook, 03_three.ipynb"),
        ('tags=["parameters"]', "", "has 0 cells with the tag `parameters`"),
        ("  # how many points to draw", "", "has a parameter without a comment: POINTS"),
        ("POINTS: int = 3", "POINTS = 3", "is not `NAME: type = value  # meaning`"),
        ("POINTS: int = 3", "points: int = 3", "not in upper case: points"),
        ("POINTS: int = 3", "POINTS: int = len('abc')", "derives a parameter"),
        ("INTERACTIVE: bool = True", "LIVE: bool = True", "no parameter INTERACTIVE"),
        ('tags=["check"]', "", "no cell with the tag `check`"),
        ("assert POINTS > 0", "print(POINTS > 0)", "a check cell without an assert"),
        ("POINTS + 1", "!pip install something", "installs packages"),
        ("POINTS + 1", "POINTS\n" * 40, "has a cell of 40 lines"),
    ],
)
def test_each_fault_of_a_source_is_found(folder, old, new, message):
    path = folder / "02_two.py"
    path.write_text(SOURCE.replace(old, new))
    assert message in "\n".join(violations(read_source(path), path, Settings(timeout=60)))


def test_sources_are_found_by_number_or_name(folder):
    assert [path.stem for path in sources(folder)] == ["01_one", "02_two", "03_three"]
    assert [path.stem for path in sources(folder, ["03", "01_one.ipynb"])] == ["03_three", "01_one"]
    with pytest.raises(ValueError, match="'04' fits 0 notebooks; there are: 01_one, 02_two, 03_three"):
        sources(folder, ["04"])
    with pytest.raises(ValueError, match="holds no notebook sources"):
        sources(folder.parent)


def test_shared_parameters_reach_those_that_have_them(folder):
    settings = load_settings(folder)["02_two"]
    assert parameter_names(folder / "02_two.py") == ["POINTS", "INTERACTIVE", "NAME"]
    assert chosen_parameters(folder / "02_two.py", settings) == {"INTERACTIVE": False, "POINTS": 5}


def test_a_misspelt_parameter_is_an_error(folder):
    with pytest.raises(ValueError, match=r"02_two.py has no parameters \['POINT'\].*'POINTS'"):
        chosen_parameters(folder / "02_two.py", Settings(timeout=60, parameters={"POINT": 5}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("02_two: {timeouts: 5}", "unknown key 'timeouts'"),
        ("02_two: {}", "needs `timeout`"),
        ("02_two: {timeout: 5, needs: tpu}", "`needs` is one of cpu, gpu"),
        ("02_two: {timeout: 5, expect: {loss: [2, 1]}}", r"`expect` of loss is \[lowest, highest\]"),
        ("- 02_two", "has to be a mapping"),
    ],
)
def test_wrong_settings_are_named(folder, text, message):
    (folder / "ci.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(folder)


def test_a_failing_cell_or_a_slow_one_stops_the_notebook(folder):
    (folder / "01_one.py").write_text("# %%\nassert False, 'teaches'\n")
    with pytest.raises(papermill.PapermillExecutionError, match="teaches"):
        execute(folder / "01_one.py", {}, timeout=60)
    (folder / "03_three.py").write_text("# %%\nimport time\ntime.sleep(60)\n")
    with pytest.raises(TimeoutError):
        execute(folder / "03_three.py", {}, timeout=1)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ultralong.notebook_tools", "run", *arguments],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_checks_and_fails(folder, monkeypatch, capsys):
    """Its first call is a process of its own; the others are calls of what it runs."""
    written = folder / "02_two.ipynb"
    checked = command(folder, "02", "--check")
    assert (checked.returncode, written.exists()) == (0, False), checked.stderr
    monkeypatch.chdir(folder.parent)
    assert main(["run", "02"]) == 0
    assert violations(nbformat.read(written, as_version=4), folder / "02_two.py", OK) == []
    before = written.read_bytes()
    shutil.copy(folder / "02_two.py", folder / "copy")
    (folder / "02_two.py").write_text(SOURCE.replace("assert POINTS > 0", "assert POINTS > 9"))
    assert main(["run", "02"]) == 1
    assert "a wave needs a point" in capsys.readouterr().err
    assert written.read_bytes() == before
    assert main(["run", "01"]) == 2
    assert "01_one is not in notebooks/ci.yml" in capsys.readouterr().err


def test_words_are_taken_over_without_running_and_other_code_is_refused(executed, folder, capsys):
    path = folder / "02_two.py"
    write_notebook(executed[0], path.with_suffix(".ipynb"))
    command = ["sync", "02", "--folder", str(folder)]
    path.write_text(SOURCE.replace("# # Waves", "# # Waves of a pond").replace("how many points", "the points"))
    assert main(command) == 0
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert notebook.cells[0].source.startswith("# Waves of a pond")
    assert outputs(notebook) == outputs(executed[0])
    kept = path.with_suffix(".ipynb").read_bytes()
    path.write_text(SOURCE.replace("POINTS + 1", "POINTS + 2"))
    assert main(command) == 2
    assert "other code than its notebook, from 'POINTS + 2'" in capsys.readouterr().err
    path.write_text(SOURCE.replace("# # Waves", "# Waves"))
    assert main(command) == 1
    assert "has 0 titles" in capsys.readouterr().err
    assert path.with_suffix(".ipynb").read_bytes() == kept


def test_only_plain_values_are_stored(capsys):
    store(loss=0.5, steps=3)
    assert capsys.readouterr().out == "loss = 0.5, steps = 3\n"
    with pytest.raises(ValueError, match="got a list"):
        store(losses=[0.5])


def test_a_run_with_other_parameters_is_recorded_also_when_a_cell_fails(folder, capsys):
    """One execution whose last check fails: the notebook up to there, and what its checks and `store` said before."""
    path = folder / "02_two.py"
    path.write_text(SOURCE + '\n# %% tags=["check"]\nprint("ok: drawn")\n\n# %%\nraise ValueError("lost")\n')
    out = folder.parent / "out"
    typed = ["record", "02", "--set", "POINTS=7", "--set", "NAME=long", "--folder", str(folder), "--out", str(out)]
    assert main(typed) == 1
    assert "lost" in capsys.readouterr().out
    found = json.loads((out / "02_two.json").read_text())
    assert found["machine"]["date"]
    assert found["rows"][0].pop("seconds") > 0
    assert found["rows"] == [
        {
            "notebook": "02_two",
            "parameters": {"INTERACTIVE": False, "POINTS": 7, "NAME": "long"},
            "checks": ["ok: drawn"],
            "values": {"points": 7},
            "error": "ValueError: lost",
        }
    ]
    assert "long 7 False" in outputs(nbformat.read(out / "02_two.ipynb", as_version=4))
    assert main([*typed[:2], "--set", "DOTS=1", *typed[6:]]) == 2
    assert "POINTS, INTERACTIVE, NAME" in capsys.readouterr().err
