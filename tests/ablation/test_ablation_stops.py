"""A study that is stopped at moments that last no time: the same command goes on, and leaves nothing behind."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.small_study import ARM, study_file
from ultralong.ablation import ablate, load_study
from ultralong.ablation import train_run as training
from ultralong.utils.files import read_json


@pytest.fixture
def study(tmp_path, make_tiny_model, tiny_tokenizer):
    """A study of a tiny model, one arm beside its base."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Chapter {number}. " + "It was a dark night. " * 100)
    changes = {"model": str(tmp_path / "model"), "stages": [{"to": 384, "factor": 2}]}
    changes["evaluation"] = {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1}
    return load_study(study_file(tmp_path, tmp_path / "texts", arms=(ARM,), **changes))


def stopped_removing(monkeypatch, when, last):
    """Have the first removal of such a folder stop before the last file, as a kill may."""
    real = shutil.rmtree

    def remove(folder, *arguments, **options):
        if not when(Path(folder)):  # of a temporary folder it is a text
            return real(folder, *arguments, **options)
        monkeypatch.setattr(training.shutil, "rmtree", real)
        for file in [file for file in folder.rglob("*") if file.is_file() and file.name != last]:
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(training.shutil, "rmtree", remove)


def test_what_was_killed_while_it_wrote_is_removed(study, tmp_path):
    """Of all files of the study's own folder, which no single call holds, and of a run's settings beside it."""
    study = replace(study, base=replace(study.base, processes=1))
    first = ablate(study, tmp_path / "study", quiet=True)
    (tmp_path / "study" / "study.yaml").unlink()
    other = tmp_path / "study" / first["runs"][1]["model"]
    (run,) = (path for path in (tmp_path / "study" / "runs").glob("trained-*.yaml") if path.stem != other.parent.name)
    for folder in (run.with_suffix(""), *(tmp_path / "study" / "shared").glob("measured-*")):
        shutil.rmtree(folder)
    left = [
        path.with_name(f".{path.name}.0123456789ab.partial")
        for path in (*(tmp_path / "study" / name for name in ("study.yaml", "results.json", "report.html")), run)
    ]
    for path in left:
        path.write_text('{"half": ')
    again = ablate(study, tmp_path / "study", quiet=True)
    assert again["outcomes"] == first["outcomes"]
    assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("gone", ["runs/trained-*", "runs/trained-*/log.jsonl", "runs"])
def test_a_deleted_run_whose_measurements_are_kept_is_not_trained_again(study, tmp_path, gone, capsys):
    """As someone does who needs the disk: the table is what it was, and what the run took is not known any more."""
    first = ablate(study, tmp_path / "study", quiet=True)
    assert "not known" not in (tmp_path / "study" / "report.html").read_text().lower()
    for path in list((tmp_path / "study").glob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = ablate(study, tmp_path / "study")
    assert capsys.readouterr().err == "2 of 2 runs (arm and seed) are measured already\n", "nothing was left to be done"
    assert (again["outcomes"], again["verdicts"], again["missing"]) == (first["outcomes"], first["verdicts"], [])
    assert [(run["tokens"], run["loss"], run["step_seconds"]) for run in again["runs"]] == [(None, None, None)] * 2
    page = (tmp_path / "study" / "report.html").read_text()
    assert page.count("<td>not known</td>") == 6
    assert "whose folder was deleted" in page
    assert read_json(tmp_path / "study" / "results.json") == again


def test_a_deleted_run_that_is_still_needed_is_trained_again(study, tmp_path):
    first = ablate(study, tmp_path / "study", draw=False, quiet=True)
    base, arm = (tmp_path / "study" / run["model"] for run in first["runs"])
    for run in (base, arm):
        shutil.rmtree(run.parent)
    measured = [path for path in (tmp_path / "study" / "shared").glob("measured-*") if asks_about(path, arm)]
    assert len(measured) == 1
    shutil.rmtree(measured[0])
    again = ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert (again["outcomes"], again["missing"]) == (first["outcomes"], [])
    assert [run["tokens"] for run in again["runs"]] == [None, first["runs"][1]["tokens"]]
    assert (arm.exists(), base.exists()) == (True, False)


def asks_about(measured, model):
    """Whether an evaluation was of that model."""
    return str(model) in (measured / "run.yaml").read_text()


def test_states_go_where_a_run_was_stopped_after_its_model(study, tmp_path, monkeypatch):
    stopped_removing(monkeypatch, lambda folder: folder.name == "checkpoints", "state.json")
    with pytest.raises(KeyboardInterrupt):
        ablate(study, tmp_path / "study", draw=False, quiet=True)
    runs = tmp_path / "study" / "runs"
    (base,) = runs.glob("trained-*/result.json")
    assert (base.parent / "checkpoints").exists(), "it was stopped before it removed them"
    found = base.read_bytes()
    assert ablate(study, tmp_path / "study", draw=False, quiet=True)["missing"] == []
    assert not list(runs.glob("*/checkpoints"))
    assert base.read_bytes() == found, "a finished run was trained again"


def test_a_run_that_is_stopped_while_it_is_deleted_is_trained_again(study, tmp_path, monkeypatch):
    first = ablate(study, tmp_path / "study", draw=False, quiet=True)
    runs = tmp_path / "study" / "runs"
    for folder in [*runs.glob("*/model"), *(tmp_path / "study" / "shared").glob("measured-*")]:
        shutil.rmtree(folder)
    stopped_removing(monkeypatch, lambda folder: "trained-" in folder.name, "log.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ablate(study, tmp_path / "study", draw=False, quiet=True)
    again = ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert again["outcomes"] == first["outcomes"]
    assert not list(runs.glob(".*")), "what was deleted in part is still there"
