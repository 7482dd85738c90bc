"""`ultralong runs`: each state is told from the folder's own files, of this version's runs and of unfinished ones."""

import json
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from forked import forked_agents
from tiny_run import make_run

from ultralong import api, cli
from ultralong.launch.runs import find_runs, resume_command, state_of, table
from ultralong.training import loop
from ultralong.training.loop import train
from ultralong.training.run_folder import process_counts
from ultralong.utils.files import locked, read_json, write_json


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """One folder with a finished run, one that failed, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = make_run(folder, make_tiny_model(), tiny_tokenizer, steps=3, save_every=1, out="group/finished")
        train(run, quiet=True)
        step = loop.training_step

        def stopped(error):
            def instead(run, number):
                if number == 2:
                    raise error
                return step(run, number)

            return instead

        for name, error in (("failed", FloatingPointError("Step 3: the loss is nan.")), ("stopped", SystemExit(143))):
            patch.setattr(loop, "training_step", stopped(error))
            with pytest.raises(type(error)):
                train(replace(run, out=f"group/{name}"), quiet=True)
    return folder


def test_each_state_is_told(place):
    found = {Path(run.folder).name: run for run in find_runs(place)}
    assert {name: run.state for name, run in found.items()} == {
        "finished": "finished", "failed": "failed", "stopped": "interrupted"
    }  # fmt: skip
    assert (found["finished"].step, found["finished"].steps, found["finished"].saved) == (3, 3, 3)
    assert (found["finished"].seconds_left, found["finished"].reason) == (None, "")
    assert (found["failed"].step, found["failed"].saved) == (2, 2)
    assert found["failed"].reason == "Step 3: the loss is nan."
    assert (found["failed"].tokens_per_second or 0) > 0
    assert found["failed"].seconds_left is not None
    lines = table(list(found.values())).splitlines()
    assert len(lines) == 4
    assert any("2/3" in line and line.endswith("the loss is nan.") for line in lines)


def test_a_held_folder_is_running_and_a_resumed_run_has_no_old_reason(place, monkeypatch):
    folder = place / "group" / "failed"
    with locked(folder):
        assert state_of(folder).state == "running"
    monkeypatch.chdir(place)
    from ultralong.training.config import TrainConfig
    from ultralong.utils import settings

    train(settings.load(TrainConfig, folder / "config.yaml"), resume=True, quiet=True)
    assert (state_of(folder).state, state_of(folder).reason) == ("finished", "")
    assert not (folder / "stopped.json").exists()


def test_damaged_and_foreign_folders_are_told(place, tmp_path, capsys):
    run = tmp_path / "killed"
    (run / "checkpoints" / "step-0000005").mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 9\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "config.yaml").write_text("steps: 9\n")
    (found,) = find_runs(tmp_path)
    assert (found.state, found.saved, found.steps, found.loss) == ("interrupted", 5, 9, None)
    (run / "log.jsonl").write_text("no json\n")
    assert "line 1: not valid JSON" in state_of(run).reason
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").mkdir()
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    assert ("directory" in state_of(run).reason, state_of(run).steps) == (True, 0)
    with pytest.raises(ValueError, match="is not a folder"):
        find_runs(tmp_path / "missing")
    cli.main(["runs", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["state"] == "interrupted"
    assert f"ultralong train {run}/config.yaml --resume" in capsys.readouterr().out
    cli.main(["runs", str(tmp_path / "scripts")])
    assert "No run in" in capsys.readouterr().out


def test_the_command_resumes_that_run_wherever_it_is_seen_from(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    assert resume_command(Path("group/stopped")) == "ultralong train group/stopped/config.yaml --resume"
    # The model and the rows are found from where the run was started.
    there = f"cd {place} && ultralong train group/stopped/config.yaml --resume"
    monkeypatch.chdir(place / "group")
    assert resume_command(Path("stopped")) == there
    monkeypatch.chdir(tmp_path)
    assert resume_command(place / "group" / "stopped") == there
    # By its own `out`, a moved run's config would start another run where it was before.
    monkeypatch.chdir(place)
    shutil.copytree(place / "group" / "stopped", place / "it moved")
    command = shlex.split(resume_command(Path("it moved")))
    assert command == ["ultralong", "train", "it moved/config.yaml", "--resume", "--set", "out=it moved"]
    cli.main(command[1:])
    assert state_of(place / "it moved").state == "finished"
    assert state_of(place / "group" / "stopped").state == "interrupted"


def test_a_run_of_several_processes_is_resumed_on_as_many(tmp_path, monkeypatch, capsys):
    """By what it recorded when it stopped or, where it was killed, when it last saved."""
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "run" / "checkpoints" / "step-0000002"
    saved.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("steps: 9\nout: run\n")
    plain = "ultralong train run/config.yaml --resume"
    assert resume_command(Path("run")) == plain, "nothing is recorded"
    write_json(saved / "state.json", {"step": 2, "processes": 4})  # as 0.3 wrote it
    assert resume_command(Path("run")) == f"{plain} --processes 4"
    write_json(saved / "state.json", {"step": 2, "processes": 16, "hosts": 2})
    cli.main(["runs"])
    assert f"To resume one, on 2 hosts, by the scripts that started it (ultralong launch); on one: {plain}\n" in (
        capsys.readouterr().out
    )
    write_json(tmp_path / "run" / "stopped.json", {"state": "failed", "reason": "", "processes": 2, "hosts": 1})
    cli.main(["runs"])
    assert f"To resume one: {plain} --processes 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(("here", "hosts"), [(None, 1), ("4", 2), ("8", 1)])
def test_hosts_are_told_by_torchruns_own_count(monkeypatch, here, hosts):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert process_counts(8) == {"processes": 8, "hosts": hosts}


def test_what_a_run_of_two_processes_records_is_read(tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, make_tiny_model(), tiny_tokenizer, steps=2, save_every=1)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with forked_agents():
        api.train(run, processes=2, quiet=True)
    assert [*temporary.iterdir()] == [], "torchrun's folder was left"
    recorded = read_json(Path(run.out, "checkpoints", "step-0000002", "state.json"))
    assert (recorded["processes"], recorded["hosts"]) == (2, 1)
    assert resume_command(Path(run.out)).endswith(" --resume --processes 2")
