"""`ultralong bench saves`: steps with and without checkpoints in one run."""

from pathlib import Path

import pytest

from ultralong.bench.run_tables import saves_table
from ultralong.bench.training import saves
from ultralong.bench.training.case import TrainingCase
from ultralong.training.config import MemoryConfig


def test_a_measured_row_holds_what_saves_cost(tmp_path, make_tiny_model, monkeypatch):
    make_tiny_model().save_pretrained(tmp_path / "tiny")
    here = lambda gpus, module, *words: saves.work(Path(words[0]), words[1], int(words[2])) or {}  # noqa: E731
    monkeypatch.setattr(saves, "start_ranks", here)
    case = TrainingCase(str(tmp_path / "tiny"), 96, steps=2, memory=MemoryConfig(activation_checkpointing=True))
    row = saves.measure_saves(case, saves=1, folder=tmp_path / "made")
    states = 3 * 4 * row["parameters"] / 2**30  # float32 parameters and AdamW's two
    assert states < row["checkpoint_gib"] + 0.001
    (save,) = row["saves"]
    assert save["steps_beside"] >= 2
    assert min(save["copy_seconds"], save["write_seconds"], row["waited_seconds"], row["seconds_per_step"]) > 0
    assert row["cost_seconds"] == pytest.approx(save["copy_seconds"] + save["slower_seconds"], abs=2e-4)
    assert "in the background: copied in" in saves.line(row)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "made").iterdir()) == [
        "rows",
        "rows",
        "rows",
        "rows",
        "tiny",
    ]


def test_the_cost_of_a_save_is_its_copy_and_what_steps_beside_it_take_longer():
    beside = [{"copy_seconds": 9.0, "write_seconds": 1.0, "steps": [5.0]}]  # the first one allocates
    beside += [{"copy_seconds": 0.5, "write_seconds": 3.0, "steps": [2.25, 2.0]}] * 2
    found = saves.summary([2.0, 2.0, 2.1], beside, 7.0, 2**30)
    assert (found["cost_seconds"], found["cost_of_a_step"], found["spread"]) == (0.75, 0.375, 0.05)
    assert (found["first_copy_seconds"], found["waited_seconds"], found["checkpoint_gib"]) == (9.0, 7.0, 1.0)
    text = saves.line({"model": "m", "tokens": 1024, "gpus": 2, "gpu": "H200", **found})
    assert "costs 0.75 s, 37.5% of a step; waited for: 7 s" in text
    assert "boom" in saves.line({"model": "m", "tokens": 1, "gpus": 2, "gpu": "x", "note": "boom", "messages": ""})


def test_tables_hold_what_was_recorded():
    row = {"model": "m", "tokens": 1024, "gpus": 2, **saves.summary([2.0], [_SAVE] * 2, 7.0, 2**30)}
    assert saves_table([{"rows": [row, {**row, "note": "out of memory"}]}])[2:] == [
        "| m | 2 | 1,024 | 2.00 | 1.0 | 0.50 s | 3.0 s | 0.25 s | 12.5% | 7.0 s |"
    ]
    assert saves_table([]) == []


_SAVE = {"copy_seconds": 0.5, "write_seconds": 3.0, "steps": [1.75]}
