"""What every notebook of the course has, beside the rules that any executed notebook keeps."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from ultralong.course import exercises
from ultralong.notebook_tools.run import read_source
from ultralong.notebook_tools.settings import NAME, load_settings
from ultralong.notebook_tools.values import stored

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SETTINGS = load_settings(FOLDER)
SOURCES = sorted(FOLDER.glob(NAME))
WORDS = (1500, 2500)
PLOTLY = "application/vnd.plotly.v1+json"


def broken(source, notebook, number, expected):
    """What a notebook lacks, in words.

    Args:
        source: The percent source as a notebook.
        notebook: The executed notebook.
        number: Its two digits.
        expected: Names of the values that `ci.yml` bounds.
    """
    code = "\n".join(cell.source for cell in source.cells if cell.cell_type == "code")
    text = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    called = {
        what: set(re.findall(rf'\b{what}\(\s*"({number}\.\w+)"', code)) for what in ("check", "predict", "reveal")
    }
    own = {task.name for task in exercises() if task.notebook == number}
    if len(called["check"]) < 3 or called["check"] != own:
        yield f"checks the exercises {sorted(called['check'])}; its own are {sorted(own)}, and three are needed"
    if len(called["predict"]) < 2 or called["predict"] != called["reveal"]:
        yield f"asks for {sorted(called['predict'])} and reveals {sorted(called['reveal'])}; two guesses are needed"
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if PLOTLY in output.get("data", {})
    ]
    if not any(output.data[PLOTLY]["layout"].get("sliders") for output in shown):
        yield "has no figure that moves without a kernel"
    alts = [output.metadata.get("image/png", {}).get("alt", "") for output in shown]
    if bare := sum(len(alt.split()) < 6 for alt in alts):
        yield f"has {bare} figures without alternative text in their metadata, where a page reads it"
    for heading in (
        "## What this does not show",
        "## Recap",
        "**Needs:**",
        "**You will be able to**",
        "reading and doing",
    ):
        if heading not in text:
            yield f"has no {heading!r}"
    if "**Before this:**" not in text:
        yield "does not say what comes before it"
    if len(set(re.findall(r"\]\((https?://[^)\s]+)", text))) < 3:
        yield "links to fewer than three sources"
    if unbounded := set(stored(notebook)) - expected:
        yield f"stores {sorted(unbounded)} without a bound in ci.yml"
    prose = re.sub(r"\]\([^)]*\)", "]", text)
    if not WORDS[0] <= (words := sum(bool(re.search(r"\w", word)) for word in prose.split())) <= WORDS[1]:
        yield f"has {words} words; {WORDS[0]} to {WORDS[1]} explain enough and tire nobody"


def test_the_overview_has_the_exercises_and_the_minutes_of_each_notebook():
    text = (FOLDER / "README.md").read_text()
    for path in SOURCES:
        number, source = path.stem[:2], path.read_text()
        (line,) = (line for line in text.splitlines() if line.startswith(f"| [{path.stem}]("))
        reading, doing, count = re.search(r"\| (\d+) \+ (\d+) min \|.*\| (\d+) \|", line).groups()
        own = exercises(number)
        assert int(count) == len(own), path.stem
        assert abs(int(doing) - sum(task.minutes for task in own)) <= 8, path.stem
        assert f"| reading and doing | {reading} and {doing} minutes |" in source, path.stem


def pair(path):
    return read_source(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_of_the_course_is_whole(path):
    source, notebook = pair(path)
    assert list(broken(source, notebook, path.stem[:2], set(SETTINGS[path.stem].expect))) == []


def absent_names(source):
    """What a percent source imports from the library and the library does not have; nothing of it is executed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ultralong":
            for name in node.names:
                if not hasattr(importlib.import_module(node.module), name.name):
                    try:
                        importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        yield f"{node.module}.{name.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_name_that_a_notebook_imports_from_the_library_is_there(path):
    """A name that moved stops a notebook at its first cell, which is seen here without executing it."""
    assert not list(absent_names(path.read_text()))


def test_a_name_that_moved_is_found():
    moved = "from ultralong import figures\nfrom ultralong.utils.files import write_text, not_there\n"
    assert list(absent_names(moved)) == ["ultralong.utils.files.not_there"]


def test_each_rule_finds_its_fault():
    """A notebook without any of it breaks every rule, and one fault breaks one."""
    path = SOURCES[6]
    source, notebook = pair(path)
    expected = set(SETTINGS[path.stem].expect)
    empty = nbformat.v4.new_notebook()
    assert len(list(broken(empty, empty, "06", expected))) == 11
    assert [len(list(broken(source, notebook, "06", expected - {"worst_error"})))] == [1]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("image/png", None)
    found = list(broken(source, notebook, "06", expected))
    assert len(found) == 1
    assert "alternative text" in found[0]
