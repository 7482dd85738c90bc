"""`~` in the paths of settings, recipes and command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import forked_command

from ultralong.cli import main
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.select.decontaminate import TestSet
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.training.config import DataSource, TrainConfig
from ultralong.utils.words import expand_word, odd_word

RECIPE = "name: r\ndescription: d\nsources: [{name: a, license: x, path: '~/texts'}]\n"


def test_the_home_folder_in_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(model="~/m", out="~/run", data=(DataSource("~/rows"),), steps=1)
    assert (config.model, config.out) == (f"{tmp_path}/m", f"{tmp_path}/run")
    assert config.data[0].rows == f"{tmp_path}/rows"
    run = RunSettings("~/m", ("needle",), haystack="~/h", rows="~")
    assert (run.model, run.haystack, run.rows) == (f"{tmp_path}/m", f"{tmp_path}/h", str(tmp_path))
    assert TestSet("t", path="~/tests").path == f"{tmp_path}/tests"
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert load_recipe(tmp_path / "r.yaml").sources[0].path == str((tmp_path / "texts").resolve())
    assert load_recipe(tmp_path / "r.yaml", ("sources=[{name: b, license: x, path: ~/other}]",)).sources[0].path == str(
        (tmp_path / "other").resolve()
    )
    assert TrainConfig(model="a/~b", out="c~", data=(DataSource("d"),), steps=1).out == "c~"


def test_the_home_folder_in_words_of_a_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_word("--out=~/rows") == f"--out={tmp_path}/rows"
    assert expand_word("~/rows") == f"{tmp_path}/rows"
    for word in ("--set", "a=~/b", "~", "--separator=~", "x~/y"):
        assert expand_word(word) == word


def test_a_command_writes_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the tide came in at dawn. " * 40)
    main(["data", "stats", "~/texts", "--json=~/counted.json", "--quiet"])
    assert (tmp_path / "counted.json").is_file()
    assert not (Path.cwd() / "~").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pack", "docs", "--out", ""), "word 4 is empty"),
        (("eval", "run", "needle", " ", "--out", "o"), "word 4 is empty"),
        (("train", "run.yaml", "--json="), "word 3 is empty (--json=)"),
        (("extend", "\udcff"), "word 2 is no UTF-8"),
    ],
)
def test_a_word_that_nothing_can_take(words, said, tmp_path):
    """As a folder an empty one would be the current one: the rows would go there."""
    assert odd_word(words).startswith(said)
    done = forked_command(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0][: len(said) + 11]) == (2, f"ultralong: {said}")
    assert not list(tmp_path.iterdir())


def test_words_that_hold_something():
    assert odd_word(["train", "run.yaml", "--set", "recipe=", "a=\n- 1", "--out=\u6f6e", "-h"]) is None


@pytest.mark.parametrize("name", ["model", "out"])
def test_an_empty_path_of_settings(name):
    given = {"model": "m", "out": "o", name: " "}
    with pytest.raises(ValueError, match=f"{name} is empty"):
        TrainConfig(**given, data=(DataSource("d"),), steps=1)


def test_empty_paths_of_rows_texts_and_runs():
    for make in (
        lambda: DataSource(""),
        lambda: RunSettings("m", ("needle",), haystack=""),
        lambda: TestSet("t", path=""),
        lambda: RunSettings("", ("needle",)),
    ):
        with pytest.raises(ValueError, match="is empty"):
            make()


def test_a_name_in_utf8_is_none_to_blame_under_another_locale():
    """Python takes ASCII for the encoding of names where its UTF-8 mode and the locale's coercion are off."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from ultralong.utils.words import odd_word; print(odd_word(sys.argv[1:]))"
    for name, said in ((b"m\xc3\xa9", "word 1 is UTF-8, and this locale"), (b"m\xe9", "word 1 is no UTF-8")):
        command = [sys.executable, "-c", code, name]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert told.startswith(said)
