"""YAML is read within bounds: no key twice, no endless expansion, every refusal one sentence that names the place."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from forked import forked_command

import ultralong
from ultralong.cli import main
from ultralong.data.recipe.schema import load_recipe
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.training.config import TrainConfig, preset
from ultralong.utils import settings
from ultralong.utils.text_formats import LARGEST, MOST_VALUES, read_yaml

CONFIG = "model: m\nout: r\ndata: [{rows: rows}]\nsteps: 10\n"
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1\nsteps: 2\n", "found the key 'steps' twice"),
        ("optimizer: {lr: 1, lr: 2}\n", "found the key 'lr' twice"),
        ("- {a: 1}\n- {b: 1, 'b': 2}\n", "found the key 'b' twice"),
        ("1: x\n1: y\n", "found the key '1' twice"),
        (LAUGHS, f"aliases stand for more than {MOST_VALUES:,} values"),
        ("a: &a [*a]\n", "an alias stands for a value that holds it, line 1"),
        ("a: &a {b: {c: *a}}\n", "an alias stands for a value that holds it"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "{b: " * 2000, "nested too deeply"),
        ("a: [", "while parsing"),
        ("a: \x00", "not allowed"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [1]\n: 2", "unhashable"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: " + "x" * LARGEST, "characters, and more than"),
    ],
    ids=lambda value: " ".join(str(value).split())[:24],
)
def test_what_has_no_sense_is_refused_at_once(text, said):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r".") as error:
        read_yaml(text)
    assert said in str(error.value)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "text",
    [
        CONFIG, "", "# nothing\n", "a: &x {b: 1}\nc: *x\nd: *x\n", "a: &x {b: 1}\nc: {<<: *x, b: 2}\n", "[1, 2, 3]",
        "a: &x {b: 1}\ne: &y {d: 1}\nc:\n  <<: *x\n  <<: *y\n", "text: |\n  a: 1\n  a: 2\n", "{1: a, '1': b}", "1e3",
        "when: 2026-11-29", "{true: 1, 'true': 2}",
    ],
)  # fmt: skip
def test_what_has_sense_is_read_as_before(text):
    assert read_yaml(text) == yaml.safe_load(text)


def test_every_preset_reads_as_before():
    for path in Path(preset("tiny-cpu")).parent.glob("*.yaml"):
        assert read_yaml(path.read_text()) == yaml.safe_load(path.read_text()), path


def test_a_file_is_named_wherever_it_is_read(tmp_path):
    """Settings of a run, changes of them, recipes, settings of an evaluation."""
    path = tmp_path / "file.yaml"
    path.write_text(CONFIG + "steps: 20\n")
    with pytest.raises(ValueError, match=r"(?s)file\.yaml is not valid YAML: .*the key 'steps' twice"):
        settings.load(TrainConfig, path)
    path.write_text(CONFIG)
    for value in ("{lr: 1, lr: 2}", "&a [*a]", "[" * 3000, "{lr: "):
        with pytest.raises(ValueError, match=r"--set optimizer=.*: the value is not valid YAML"):
            settings.load(TrainConfig, path, [f"optimizer={value}"])
    path.write_text("name: r\ndescription: d\nsources: [{name: a, license: x, path: t}]\nname: s\n")
    with pytest.raises(ValueError, match=r"(?s)file\.yaml is not valid YAML: .*the key 'name' twice"):
        load_recipe(path)
    path.write_text("model: m\ntasks: [needle]\nmodel: n\n")
    with pytest.raises(ValueError, match=r"(?s)file\.yaml is not valid YAML: .*the key 'model' twice"):
        settings.load(RunSettings, path)


def test_yaml_is_read_in_one_place():
    """So that its bounds hold for model cards, runs' settings, studies and notebooks' parameters too."""
    package = Path(ultralong.__file__).parent
    readers = re.compile(r"yaml\.(?:safe_load|load|full_load|unsafe_load|safe_load_all|load_all|parse|compose)\(")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if readers.search(path.read_text())}
    assert not found


def test_a_wrong_value_is_shown_in_part(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    with pytest.raises(ValueError, match="steps must be of type int") as error:
        settings.load(TrainConfig, path, [f"steps=[{', '.join(['1'] * 50_000)}]"])
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", ["{lr: ", "[[[", "'", "&a [*a]", "{lr: 1, lr: 2}"])
def test_set_with_broken_yaml_is_one_line(value, capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "tiny-cpu", "--set", "model=m", "out=o", f"optimizer={value}"])
    told = capsys.readouterr().err
    assert left.value.code == 1
    assert len(told.splitlines()) == 1
    assert "the value is not valid YAML" in told


@pytest.mark.parametrize("place", ["model", "out", "rows", "file"])
def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch, place):
    """In a file and after --set, where no shell has read it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    changes = {"model": ["model=~/x"], "out": ["out=~/x"], "rows": ["data=[{rows: ~/x}]"], "file": []}[place]
    found = settings.load(TrainConfig, preset("~/c.yaml"), changes)
    got = {"model": found.model, "out": found.out, "rows": found.data[0].rows, "file": str(tmp_path / "x")}[place]
    assert got == str(tmp_path / "x")
    assert settings.from_mapping(TrainConfig, settings.to_mapping(found)) == found


def test_a_tilde_after_an_equals_sign_is_the_home_folder(tmp_path):
    """A shell leaves it as it is in --out=~/scripts."""
    words = ["launch", "tiny-cpu", "--nodes", "1", "--gpus-per-node", "2"]
    words += ["--out=~/scripts", "--set", "model=~/m", "out=~/run", "data=[{rows: ~/rows}]"]
    made = forked_command(*words, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": ""})
    assert made.returncode == 0, made.stderr
    assert not (tmp_path / "~").exists()
    found = settings.load(TrainConfig, tmp_path / "scripts" / "config.yaml")
    assert (found.model, found.out, found.data[0].rows) == tuple(str(tmp_path / name) for name in ("m", "run", "rows"))


@pytest.mark.parametrize("name", ["model", "haystack", "data", "rows"])
def test_paths_of_an_evaluation_may_begin_with_a_tilde(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"model": "m", "tasks": ("needle",)} | {name: "~/x"}
    assert getattr(RunSettings(**values), name) == str(tmp_path / "x")


@pytest.mark.parametrize("number", ["010", "-012", "00", "01_0", "1:30", "12:30:45", "1:30.5"])
def test_a_number_that_yaml_1_2_reads_otherwise(number, tmp_path):
    """PyYAML takes 010 for 8 and 1:30 for 90."""
    (tmp_path / "run.yaml").write_text(CONFIG.replace("10", number))
    for changes in ((), (f"steps={number}",)):
        if changes:
            (tmp_path / "run.yaml").write_text(CONFIG)
        with pytest.raises(ValueError, match=f"{number} is another number in YAML 1.1 than in 1.2"):
            settings.load(TrainConfig, tmp_path / "run.yaml", changes)


def test_numbers_that_every_reader_takes_for_the_same():
    for text, value in (("0", 0), ("-0", 0), ("10", 10), ("0.5", 0.5), ("0x1F", 31), ("1_000", 1000), ("'010'", "010")):
        assert read_yaml(text, settings=True) == value
    assert read_yaml("a: 010") == {"a": 8}  # of another program's file
