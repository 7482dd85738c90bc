"""The committed notebooks: each is there, was made from its source, and can be read without running anything."""

import re
from pathlib import Path

import nbformat
import pytest

from ultralong.notebook_tools.rules import violations
from ultralong.notebook_tools.settings import NAME, load_settings

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SETTINGS = load_settings(FOLDER)
SOURCES = sorted(FOLDER.glob(NAME))


def test_each_source_has_its_notebook_and_each_notebook_its_source():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_committed_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert violations(notebook, path, SETTINGS[path.stem]) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_figures_are_interactive_and_still(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    bundles = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    shown = [data for data in bundles if "application/vnd.plotly.v1+json" in data]
    assert shown, "a notebook shows what it says"
    assert all("image/png" in data for data in shown)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_numbers_start_each_name_in_order(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert [other.stem[:2] for other in SOURCES].count(path.stem[:2]) == 1
