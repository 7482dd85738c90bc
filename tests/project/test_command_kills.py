"""Commands that are killed at random moments: a few of the trials that `tests/support/command_kill_trials.py` makes."""

import json
import sys

import pytest
from command_kill_trials import command_kill_trials, contents, differences, half_written
from kill_programs import PROGRAMS, prepare


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="a child's end with its parent is Linux's")
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_that_is_killed_leaves_what_one_leaves_that_is_not(name, tmp_path, make_tiny_model, tiny_tokenizer):
    prepare(tmp_path, make_tiny_model, tiny_tokenizer)
    found = command_kill_trials(name, tmp_path, kills=3, seed=7)
    assert found["wrong"] == []
    assert found["differences"] == []
    assert found["counts"]["killed"] >= 3


def run_of(folder, loss, steps=(2, 4), weights=b"weights"):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    records = [{"step": step, "loss": loss, "seconds": time} for step, time in ((1, 0.25), (2, 0.5))]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in steps:
        (folder / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:07d}" / "state.json").write_text(json.dumps({"step": step}))
    return contents(folder)


def test_what_differs_is_told(tmp_path):
    alone = run_of(tmp_path / "alone", loss=3.5)
    assert alone["log.jsonl"][1] == {"step": 2, "loss": 3.5}, "seconds are a run's own"
    assert differences(alone, run_of(tmp_path / "elsewhere", loss=3.5, steps=(3, 4))) == []
    assert differences(alone, run_of(tmp_path / "loss", loss=3.5000001)) == ["log.jsonl differs"]
    other = run_of(tmp_path / "weights", loss=3.5, weights=b"weightt")
    assert differences(alone, other) == ["model/model.safetensors differs"]
    more = run_of(tmp_path / "more", loss=3.5, steps=(1, 2, 4))
    assert differences(alone, more) == ["checkpoints before checkpoints/step-0000004 differs"]
    (tmp_path / "more" / ".stopped.json.0123456789ab.partial").touch()
    left = {**contents(tmp_path / "more"), **{key: alone[key] for key in alone if key.startswith("checkpoints before")}}
    assert differences(alone, left) == ["only one has .stopped.json.0123456789ab.partial"]


@pytest.mark.parametrize(
    ("name", "text", "half"),
    [
        ("answers.jsonl", '{"index": 0}\n', False),
        ("answers.jsonl", '{"index": 0}\n{"ind', True),
        (".rows-00001.npy.0123456789ab.partial", "", True),
        ("checkpoints/unfinished/random-0.safetensors", "", True),
        ("checkpoints/step-0000002/state.json", "{}", False),
    ],
)
def test_what_is_half_written_is_seen(tmp_path, name, text, half):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert half_written(tmp_path) == half
