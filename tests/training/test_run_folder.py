"""A run's folder is the run's: rows that were packed again are told, and one that was moved gets no second half."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import LENGTH, make_run

from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.store import TokenStore
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training import loop
from ultralong.training.batches import RowOrder
from ultralong.training.config import ParallelConfig
from ultralong.training.loop import train
from ultralong.training.run_folder import RunFolder
from ultralong.utils.files import locked, read_json, read_jsonl, write_json


@pytest.fixture
def run(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """A run that ended early, so that it can be resumed."""
    monkeypatch.chdir(tmp_path)
    config = make_run(tmp_path, tiny_model, tiny_tokenizer, save_every=2)
    train(config, quiet=True)
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-0000004")
    return config


@pytest.mark.parametrize("change", ["text", "seed", "mask"])
def test_rows_that_were_packed_again_from_something_else(run, tiny_tokenizer, change):
    texts = [Document(f"d{i}", f"Another {i} of the log. " * 20, "test", "CC0-1.0") for i in range(40)]
    store = tokenize_corpus(texts, tiny_tokenizer, "others", quiet=True) if change == "text" else TokenStore("tokens")
    shutil.rmtree("rows")
    settings = PackSettings(LENGTH, seed=int(change == "seed"), mask_documents=change == "mask")
    pack(store, tiny_tokenizer, "rows", settings, quiet=True)
    log = Path("run/log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"the rows of data\[0\] are not those that the run in run was trained on"):
        train(run, resume=True, quiet=True)
    assert Path("run/log.jsonl").read_bytes() == log


def test_the_same_rows_elsewhere_and_checkpoints_that_recorded_none(run):
    recorded = Path("run/checkpoints/step-0000002/state.json")
    assert read_json(recorded)["rows"] == RowOrder.of_run(run).content()
    shutil.copytree("rows", "kept")
    shutil.rmtree("rows")
    shutil.copytree("kept", "rows")  # other times and inodes
    manifest = read_json("rows/manifest.json")
    assert all(shard.pop("largest_token") > 0 for shard in manifest["shards"])  # as an earlier version wrote it
    write_json("rows/manifest.json", manifest)
    assert read_json(recorded)["rows"] == RowOrder.of_run(run).content()
    state = read_json(recorded)
    write_json(recorded, {key: value for key, value in state.items() if key != "rows"})
    assert train(run, resume=True, quiet=True).steps == 4


@pytest.mark.parametrize("how", ["moved", "deleted"])
@pytest.mark.parametrize("when", ["a step", "a checkpoint"])
def test_a_folder_that_goes_while_it_is_written_to(run, monkeypatch, how, when):
    def go(*_):
        shutil.move("gone", "elsewhere") if how == "moved" else shutil.rmtree("gone")

    real = RunFolder.check_there
    calls = []

    def check(self):
        calls.append(self)
        if len(calls) == {"a step": 2, "a checkpoint": 3}[when]:
            go()
        real(self)

    monkeypatch.setattr(RunFolder, "check_there", check)
    with pytest.raises(FileNotFoundError, match="it was moved or deleted while the run wrote to it"):
        train(replace(run, out="gone"), quiet=True)
    assert not Path("gone").exists()
    if how == "moved":
        assert json.loads(Path("elsewhere/log.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.parametrize("jump", [-86_400.0, -1e9, 1e9])
def test_a_clock_that_is_set_while_a_run_trains(run, monkeypatch, jump):
    """Seconds, waits and locks go by a clock that nobody sets."""
    real, calls = time.time, []

    def clock():
        calls.append(1)
        return real() + jump * len(calls)

    monkeypatch.setattr(time, "time", clock)
    other = replace(run, out="clock", parallel=ParallelConfig(timeout_minutes=1))
    assert train(other, quiet=True).steps == 4
    records = read_jsonl("clock/log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 < record["seconds"] < 60 and record["tokens_per_second"] > 0 for record in records)
    with locked("clock"), pytest.raises(ValueError, match="Another process is writing"), locked("clock", wait=0.2):
        pass


def test_another_run_at_the_lock_is_told_of_by_the_setting(run, monkeypatch):
    """Training has no --out."""
    monkeypatch.setattr(loop, "LOCK_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_check_together", lambda *checked: None)  # which would meet it first
    with locked("run"), pytest.raises(ValueError, match="writing to run: wait for it, end it, or give another `out`"):
        train(run, resume=True, quiet=True)


@pytest.mark.parametrize("times", [(0, 0), (4e9, 4e9)])
def test_files_of_another_day(run, times):
    """Times of files decide nothing: those of a copy, or of a host with another clock, are any."""
    for path in Path("run").rglob("*"):
        os.utime(path, times)
    assert train(run, resume=True, quiet=True).steps == 4
