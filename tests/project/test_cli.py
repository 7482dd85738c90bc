"""The command line: help that answers at once, one-line errors, exit codes, and a chain of commands that works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ultralong import cli, miniature
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.demo import DemoConfig, load
from ultralong.training.config import PRESETS, TrainConfig, preset
from ultralong.utils import settings
from ultralong.utils.files import read_json, read_jsonl


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "ultralong", *map(str, words)], capture_output=True, text=True, **options
    )


def test_help_lists_every_command_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "bench attention"])
def test_every_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert f"usage: ultralong {name}" in shown
    if name != "demo":
        assert f"ultralong {name}" in shown.split("usage", 1)[1].split("\n", 1)[1], "there is no example"


def test_a_command_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["extnd"])
    assert left.value.code == 2
    assert "unknown command 'extnd'. Commands: extend" in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = run("extend", miniature.path(), "--to", 100, "--out", tmp_path / "x")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("ultralong extend: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
    assert run("extend", miniature.path()).returncode == 2


def test_documents_to_a_trained_model_by_commands_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            f"Chapter {number}. " + "It was a dark and stormy night. " * 60
        )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (
        ("extend", miniature.path(), "--to", 1024, "--out", "long", "--json", "extend.json"),
        ("pack", "texts", "--tokenizer", "long", "--length", 1024, "--out", "rows", "--json", "pack.json"),
        ("train", preset("tiny-cpu"), "--json", "train.json",
         "--set", "model=long", "length=1024", "out=run", "steps=2", "save_every=0", "data=[{rows: rows}]",
         "parallel.context_parallel_size=1"),
        ("eval", "needle", "run/model", "--lengths", 256, "--depths", 0.5, "--samples", 1, "--json", "needle.json"),
    ):  # fmt: skip
        done = run(*words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "extend.json")["new_window"] == 1024
    assert read_json(tmp_path / "pack.json")["rows"] == len(PackedRows(tmp_path / "rows"))
    assert read_json(tmp_path / "train.json")["steps"] == len(read_jsonl(tmp_path / "run" / "log.jsonl")) == 2
    assert "needle" in str(read_json(tmp_path / "needle.json"))
    refused = run("sft", preset("tiny-cpu"), "--set", "data=[{rows: rows}]", cwd=tmp_path)
    assert refused.returncode == 1
    assert "holds documents, not conversations" in refused.stderr


def test_every_preset_is_readable():
    for path in PRESETS.glob("*.yaml"):
        if path.stem.startswith("demo-"):
            assert isinstance(load(path.stem.removeprefix("demo-")), DemoConfig)
        else:
            config = settings.load(TrainConfig, path)
            assert config.base_model, "the planner needs a shape before there is a checkpoint"
            assert f"--length {config.length} " in path.read_text(), "the length that the preset's commands pack"


def test_the_demo_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="beyond the target window"):
        load("miniature", ["target=1024"])
    with pytest.raises(ValueError, match="neither a settings file nor a preset"):
        load("no-such-model")
