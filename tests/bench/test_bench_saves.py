"""`ultralong bench saves`: steps with and without checkpoints in one run."""

import os
import signal
import time
from pathlib import Path

import pytest

from ultralong.bench.results import append_row, last_row, read_rows
from ultralong.bench.training import saves, saves_work
from ultralong.bench.training.case import TrainingCase
from ultralong.bench.training.saves_summary import line, saves_table, summary, told
from ultralong.training.config import MemoryConfig
from ultralong.utils.files import append_jsonl
from ultralong.utils.units import GIB


@pytest.fixture
def case(tmp_path, make_tiny_model, monkeypatch):
    """One that runs in this process."""
    make_tiny_model().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(saves, "start_ranks", lambda gpus, module, *words: saves_work.run_words(words) or {})
    return TrainingCase(str(tmp_path / "tiny"), 96, steps=2, memory=MemoryConfig(activation_checkpointing=True))


def test_a_measured_row_holds_what_saves_cost(tmp_path, case, capsys):
    saves.bench_saves(case, 2, tmp_path / "made", None, 60.0, tmp_path / "saves.json")
    (row,) = read_rows(tmp_path / "saves.json")
    states = 3 * 4 * row["parameters"] / GIB  # float32 parameters and AdamW's two
    assert states < row["checkpoint_gib"] + 0.001
    assert row["complete"]
    assert len(row["free_seconds"]) == 4 * case.steps
    assert [len(save["beside_seconds"]) >= 1 for save in row["saves"]] == [True] * 3
    for save in row["saves"]:
        assert save["slower_seconds"] == pytest.approx(
            sum(save["beside_seconds"]) - len(save["beside_seconds"]) * row["seconds_per_step"], abs=2e-3
        )
        assert save["copy_seconds"] > 0
        assert 0 < save["plan_seconds"] < save["shard_seconds"] <= save["write_seconds"]
        (file,) = save["files"]
        assert states < file["bytes"] / GIB < row["checkpoint_gib"] + 0.001
        assert file["hash_seconds"] + file["write_seconds"] + file["sync_seconds"] < file["seconds"]
    assert row["waited_seconds"] > 0
    assert row["cost_of_other_step"] == pytest.approx(row["cost_seconds"] / 60, abs=2e-5)
    said = capsys.readouterr().out.splitlines()
    assert [one.split(": ")[1] for one in (*said[1:3], said[4])] == ["a step", "a step", "save 1"]
    assert "memory for copies made in" in said[3]
    assert row["reserve_seconds"] > 0
    assert "their memory made before in" in said[-1]
    assert sum("once more: copied" in one for one in said) == saves_work.COPIES
    assert "in the background: copied in" in said[-1]
    assert "of a step of 60 s it is" in said[-1]
    left = {path.name.split("-")[0] for path in (tmp_path / "made").iterdir()}
    assert left == {"rows", "tiny"}  # the run and its checkpoints are gone


def test_no_save_is_begun_that_would_end_too_late(tmp_path, case):
    row = saves.measure_saves(case, 9, tmp_path / "made", seconds=0.001)
    assert len(row["saves"]) == 1
    assert row["copy_seconds"] != row["saves"][0]["copy_seconds"]  # of a copy without a save, which allocates nothing
    assert "waited_seconds" not in row
    assert row["complete"]


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_training(tmp_path, case, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saves.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    monkeypatch.setattr(saves, "start_ranks", lambda *words: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match=r"does not fit .*made, where 0\.0 GiB are free: give --folder"):
        saves.measure_saves(case, 1, tmp_path / "made")
    with pytest.raises(ValueError, match="saves must be 0 or more"):
        saves.measure_saves(case, -1, tmp_path / "made")


def test_a_run_that_fails_keeps_what_it_measured(tmp_path, case, monkeypatch):
    def fail(gpus, module, folder, *words):
        for event in _events(1):
            append_jsonl(Path(folder) / saves_work.EVENTS, event)
        return {"note": "No space left", "messages": "boom"}

    monkeypatch.setattr(saves, "start_ranks", fail)
    row = saves.measure_saves(case, 1, tmp_path / "made")
    assert (row["note"], row["complete"], row["cost_seconds"]) == ("No space left", False, 9.25)
    assert line({**row, "gpu": "H200"}).endswith("No space left")


def test_a_file_that_was_cut_short_is_no_checkpoint(tmp_path, case, monkeypatch):
    record = saves_work.recorded_files
    shorter = lambda path: {name: {**facts, "bytes": facts["bytes"] + 1} for name, facts in record(path).items()}  # noqa: E731
    monkeypatch.setattr(saves_work, "recorded_files", shorter)
    with pytest.raises(RuntimeError, match=r"bytes where .* were written"):
        saves.measure_saves(case, 1, tmp_path / "made")


def test_the_cost_of_a_save_is_its_copy_and_what_steps_beside_it_take_longer():
    found = summary(_events(3), other_step=50.0)
    assert (found["cost_seconds"], found["cost_of_a_step"], found["spread"]) == (0.75, 0.375, 0.05)
    assert (found["cost_of_other_step"], found["steps_for_a_percent"]) == (0.015, 38)
    assert (found["checkpoint_gib"], found["gib_per_second"], found["waited_seconds"]) == (1.0, 0.333, 7.0)
    assert [save["slower_seconds"] for save in found["saves"]] == [0.25, 0.25, 0.25]
    text = line({"model": "m", "tokens": 1024, "gpus": 2, "gpu": "H200", **found})
    assert "copied in 0.5 s (the first in 9 s, with its memory), written in 3 s" in text
    assert "takes 0.75 s of training, 37.5% of a step: a hundredth of the time where 38 steps or more lie" in text
    assert "of a step of 50 s it is 1.50%; waited for: 7 s" in text
    assert "boom" in line({"model": "m", "tokens": 1, "gpus": 2, "gpu": "x", "note": "boom", "messages": ""})


def test_memory_for_copies_is_a_cost_of_its_own():
    found = summary([*_events(1)[:3], {"what": "reserved", "seconds": 4.0}, *_events(1)[3:]])
    assert (found["reserve_seconds"], found["seconds_per_step"]) == (4.0, 2.0)
    assert found["cost_seconds"] == summary(_events(1))["cost_seconds"]
    text = line({"model": "m", "tokens": 1024, "gpus": 2, "gpu": "H200", **found})
    assert "(the first in 9 s; their memory made before in 4 s), written in 3 s" in text


def test_what_was_not_measured_yet_is_left_out():
    assert summary([]) == {}
    events = _events(1)
    assert set(summary(events[:4])) == {"seconds_per_step", "free_seconds", "spread"}
    alone = summary(events)
    assert (alone["cost_seconds"], "waited_seconds" in alone) == (9.25, False)  # the first copy, for want of others
    assert [told(event) for event in events[2:]] == [
        "a step: 2.1 s",
        "save 1: copied to the host in 9 s",
        "save 1: a step beside its writing: 2.25 s",
        "save 1: 1 GiB written in 3 s, 0.333 GiB/s, its shards after 2.8 s (0.2 s to plan; 2 files beside each other: "
        "1 s to hash, 0.25 s to hand over, 1.5 s waiting for the disk)",
    ]
    assert "no checkpoint was written in time" in line({"model": "m", "tokens": 1, "gpus": 2, "gpu": "x"})


def test_a_save_whose_files_were_not_waited_for_says_how_long_they_took_at_least():
    """As where a time limit ends the bench."""
    events = [*_events(1)[:-1], {"what": "beside", "save": 0, "seconds": 2.0}]
    row = summary(events, other_step=50.0)
    assert "write_seconds" not in row["saves"][0]
    assert (row["cost_seconds"], "checkpoint_gib" in row) == (9.25, False)
    row |= {"model": "m", "tokens": 1, "gpus": 2, "gpu": "x"}
    assert (
        "a checkpoint in the background: copied in 9 s (the first in 9 s, with its memory), written in more than 4.25 s"
        in line(row)
    )
    assert "| 9.00 s | more than 4.25 s | 9.25 s |" in saves_table([{"rows": [row]}])[2]


def test_what_was_measured_is_told_at_a_time_limit(tmp_path, case, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(saves.signal, "raise_signal", ended.append)
    before = signal.getsignal(signal.SIGTERM)

    def stopped(gpus, module, folder, *words):
        for event in _events(1)[:-1]:
            append_jsonl(Path(folder) / saves_work.EVENTS, event)
        time.sleep(3 * saves.LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(saves, "start_ranks", stopped)
    saves.bench_saves(case, 1, tmp_path / "made", None, None, tmp_path / "saves.json")
    assert ended == [signal.SIGTERM]
    assert "written in more than 2.25 s" in capsys.readouterr().out
    assert read_rows(tmp_path / "saves.json")[0]["cost_seconds"] == 9.25
    assert signal.getsignal(signal.SIGTERM) == before


def test_tables_hold_what_was_recorded():
    row = {"model": "m", "tokens": 1024, "gpus": 2, **summary(_events(2), other_step=50.0)}
    without = {**row, "note": "killed", "tokens": 2048, **summary(_events(1))}
    del without["other_step"], without["waited_seconds"]
    assert saves_table([{"rows": [row, {"note": "out of memory"}, without]}])[2:] == [
        "| m | 2 | 1,024 | 2.00 | 1.0 | 0.50 s | 3 s | 0.75 s | 37.5% (1.50% of 50 s) | 7.0 s |",
        "| m | 2 | 2,048 | 2.00 | 1.0 | 9.00 s | 3 s | 9.25 s | 462.5% |  |",
    ]
    assert saves_table([]) == []


def test_the_last_row_of_a_file_is_written_again(tmp_path):
    append_row(tmp_path / "x.json", {"n": 1})
    put = last_row(tmp_path / "x.json")
    put({"n": 2})
    put({"n": 3})
    assert read_rows(tmp_path / "x.json") == [{"n": 1}, {"n": 3}]


THREAD = {"hash_seconds": 1.0, "write_seconds": 0.25, "sync_seconds": 1.5}
WRITTEN = {"plan": 0.2, "shards": 2.8, "files": [{"bytes": GIB // 2, "seconds": 2.75, **THREAD}] * 2}


def _events(count: int) -> list[dict]:
    """Steps of 2 s; saves of which the first allocates, and one step beside each that takes a quarter longer."""
    events = [{"what": "free", "seconds": seconds} for seconds in (2.0, 2.0, 2.1)]
    for number in range(count):
        events += [
            {"what": "copied", "save": number, "seconds": 0.5 if number else 9.0},
            {"what": "beside", "save": number, "seconds": 2.25},
            {"what": "written", "save": number, "seconds": 3.0, "bytes": GIB, **WRITTEN},
        ]
    return events + ([{"what": "waited", "seconds": 7.0, "bytes": GIB}] if count > 1 else [])
