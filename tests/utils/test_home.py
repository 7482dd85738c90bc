"""`~` in the paths of settings, recipes and command lines."""

from __future__ import annotations

from pathlib import Path

from ultralong.cli import main
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.select.decontaminate import TestSet
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.training.config import DataSource, TrainConfig
from ultralong.utils.home import expand_word

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
