"""Every notebook is executed under papermill with the parameters of `notebooks/ci.yml`, and keeps every rule.

`make papermill` executes them all, `make test` the one of `CANARIES`, which draws, trains nothing and starts ranks.
"""

from pathlib import Path

import pytest
import torch

from tests.support.leftovers import left_at_last
from ultralong.notebook_tools.rules import violations
from ultralong.notebook_tools.run import chosen_parameters, execute
from ultralong.notebook_tools.settings import NAME, load_settings

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SETTINGS = load_settings(FOLDER)
SOURCES = sorted(FOLDER.glob(NAME))
CANARIES = {"06_sequence_parallel"}


def test_settings_and_sources_are_the_same_notebooks():
    assert sorted(SETTINGS) == [path.stem for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_parameters_exist(path):
    chosen = chosen_parameters(path, SETTINGS[path.stem])
    assert chosen["INTERACTIVE"] is False


@pytest.mark.notebooks
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.canary] if path.stem in CANARIES else []) for path in SOURCES],
)
def test_a_notebook_runs_and_its_checks_hold(path, tmp_path, monkeypatch):
    """And nothing of it stays in the temporary folder, but torch's own cache, which has a fixed name."""
    settings = SETTINGS[path.stem]
    if settings.needs == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; the committed file shows a recorded run")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = execute(path, chosen_parameters(path, settings), settings.timeout)
    assert violations(notebook, path, settings) == []
    assert left_at_last(tmp_path) == []
