"""Watching the ranks of a run: the slow one is named, a hang tells where each stands, trackers see all numbers."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from forked import train_over
from tiny_run import before_reading, make_run

from ultralong.attention import collectives
from ultralong.launch.runs import state_of
from ultralong.training import loop, parallel
from ultralong.training.config import ParallelConfig
from ultralong.training.loop import train
from ultralong.training.watch import hang, ranks
from ultralong.training.watch.trackers import PrometheusFile, scalars
from ultralong.utils import local_ranks
from ultralong.utils.files import read_json, read_jsonl

MODES = {
    "rows are shared": ParallelConfig(context_parallel_size=2),
    "gradients are summed": ParallelConfig(),
    "parameters are sharded": ParallelConfig(fsdp_shard_degree=2),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("watch")
    return folder, make_run(folder, make_tiny_model(), tiny_tokenizer, steps=4, global_batch_size=2)


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    folder, config = made
    monkeypatch.chdir(folder)
    return replace(config, out=str(tmp_path / "run"))


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_rank_is_named_within_two_steps(run, mode, monkeypatch, capfd):
    before_reading(monkeypatch, 1, 1, lambda: time.sleep(0.8))
    train_over(replace(run, parallel=MODES[mode]), 2)
    records = read_jsonl(f"{run.out}/log.jsonl")
    for record in records[1:]:
        (_, slow), (waits, _) = record["ranks"]["compute_seconds"], record["ranks"]["waiting_seconds"]
        assert record["slowest_rank"] == 1
        assert slow >= 0.8
        assert waits >= 0.4
        assert sum(column[0] for name, column in record["ranks"].items() if name != "peak_gib") <= record["seconds"] + 1
        assert min(record["ranks"]["peak_gib"]) > 0.05  # a process with torch in it
    said = [line for line in capfd.readouterr().err.splitlines() if "is slow" in line]
    assert len(said) == 1, "once, not at each step"
    assert said[0].startswith("note: step 3: rank 1 on ")


def test_a_slow_rank_is_named_again_after_another_one_was(capsys):
    watch = object.__new__(ranks.RankWatch)
    watch._hosts, watch._slow = ["a", "b", "c", "d"], (-1, 0)
    times = [(1, 2, 1, 1), (1, 2, 1, 1), (1, 2, 1, 1), (1, 1.1, 1, 1), (3, 2, 2, 2), (1, 1, 9, 1), (1, 1, 9, 1)]
    for number, compute in enumerate(times, 1):
        watch._name_slow(number, compute, max(range(4), key=compute.__getitem__))
    assert [line.split(":")[1:3] for line in capsys.readouterr().err.splitlines()] == [
        [" step 2", " rank 1 on b is slow"],
        [" step 7", " rank 2 on c is slow"],
    ]


def _hung_rank(rank: int, world: int, port: int, config) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)  # what a Trainer has left in this test's process
    torch.set_num_threads(1)
    train(config, quiet=True)


def holds_the_interpreter() -> None:
    """Sleep in C without letting any other thread of Python run."""
    ctypes.PyDLL(None).sleep(120)


HANGS = {
    "waits for ever": (lambda: threading.Event().wait(120), "reading rows, in no collective"),
    "is stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "no answer"),
    "runs no thread": (holds_the_interpreter, "no answer"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and stops its ranks by signals of Linux")
@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_ends_with_which_rank_stands_where(run, kind, monkeypatch, capfd):
    work, stands = HANGS[kind]
    monkeypatch.setattr(hang, "STUCK", 1.0)
    before_reading(monkeypatch, 1, 1, work)
    config = replace(run, parallel=ParallelConfig(context_parallel_size=3, timeout_minutes=5 / 60))
    context = multiprocessing.get_context("fork")
    port = local_ranks.free_port()
    started = [context.Process(target=_hung_rank, args=(rank, 3, port, config)) for rank in range(3)]
    for process in started:
        process.start()
    for process in started:
        if kind != "is stopped" or process is not started[1]:
            process.join(100)
            assert process.exitcode == hang.CODE
    started[1].kill()
    (record,) = Path(run.out).glob("hang-*")
    said = capfd.readouterr().err
    report = (record / "report.txt").read_text()
    assert f"error: {report}" in said
    first, *others = report.splitlines()[1:]
    assert first.startswith("  rank 1 on ")
    assert stands in first
    assert first.endswith("<- the others wait for it")
    for rank, line in zip((0, 2), others, strict=True):
        assert f"rank {rank} on" in line
        assert "step 2, counting targets, waits in the sum over all processes" in line
        assert read_json(record / f"rank-{rank}.json")["step"] == 2
        assert "all_reduce_sum" in (record / f"rank-{rank}.txt").read_text()
    if kind == "waits for ever":
        assert " in reads" in (record / "rank-1.txt").read_text()
    state = state_of(Path(run.out))
    assert state.state == "failed"
    assert "rank 1 on" in state.reason
    assert state.step == 1


def test_ranks_that_all_wait_are_told_apart_by_what_they_have_done():
    at = {"step": 3, "stage": "pass 1 of 1", "collective": "all-to-all", "seconds": 60.0, "collectives_on_gpu": 0}
    found = {rank: {**at, "collectives_ended": 7 - (rank == 2)} for rank in range(3)}
    text = hang.describe(found, ["a", "b", "c"], Path("hang"))
    assert text.splitlines()[1].startswith("  rank 2 on c: step 3, pass 1 of 1, waits in the all-to-all, for 60 s")
    assert text.count("<- the others wait for it") == 1
    alike = hang.describe({rank: {**found[0]} for rank in range(3)}, ["a", "b", "c"], Path("hang"))
    assert "the others wait" not in alike


class Event:
    """An event of a GPU's stream that its test reaches by hand."""

    reached = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.made = self.number = getattr(Event, "made", 0) + 1

    def query(self) -> bool:
        return self.number <= Event.reached

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.number - self.number)


def test_on_a_gpu_the_stream_is_timed_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = collectives.WaitClock(torch.device("cuda"))
    with clock.running():
        for what in ("all-gather", "all-to-all"):
            with collectives.waiting(what):
                assert clock.standing == what
    assert (clock.standing, clock.ended) == ("", 2)
    assert clock.reached() == (2, "", 0)
    Event.reached = 1
    assert clock.reached() == (2, "all-gather", 0), "the host is ahead, and its GPU waits there"
    Event.reached = 0
    assert clock.take() == 0.0, "its stream has reached nothing yet"
    Event.reached = 3
    assert clock.reached() == (2, "all-to-all", 1)
    assert clock.take() == 1.0
    assert clock.take() == 0.0, "counted once"
    Event.reached = 4
    assert clock.take() == 1.0
    with collectives.waiting("after the clock"):
        assert clock.standing == ""


def test_a_stage_may_have_more_patience(tmp_path, monkeypatch):
    """As a save on a slow disk has."""
    position, ends = hang.Position(), []
    monkeypatch.setattr(hang.Watchdog, "_end", lambda self, waited: ends.append((self.position.stage, waited)))
    clock = collectives.WaitClock(torch.device("cpu"))
    position.at("saving", patience=1e6)
    with hang.Watchdog(tmp_path / "hang", 0, ["a", "b"], 0.05, position, clock).running():
        time.sleep(0.3)
        assert ends == []
        position.at("update")
        until = time.monotonic() + 30
        while not ends and time.monotonic() < until:
            time.sleep(0.01)
    assert ends[0][0] == "update"


def test_a_single_process_is_left_alone(run):
    """Its steps may be as long as they like, and its log has no ranks."""
    train(replace(run, parallel=ParallelConfig(timeout_minutes=1e-5)), quiet=True)
    assert "ranks" not in read_jsonl(f"{run.out}/log.jsonl")[0]


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets, as TensorBoard's and W&B's of accelerate pass it on."""

    name, requires_logging_directory, tracker = "recorder", False, None

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[int, dict[str, float]] = {}

    def log(self, values, step=None, **_):
        self.got[step] = values


def test_trackers_see_the_numbers_of_the_log(run, monkeypatch):
    client = pytest.importorskip("prometheus_client.parser")
    recorder = Recorder()
    monkeypatch.setattr(parallel, "make_trackers", lambda names, out: [recorder, PrometheusFile(out)])
    monkeypatch.setattr(loop, "training_step", _with_ranks(loop.training_step))
    train(replace(run, trackers=("prometheus",)), quiet=True)
    log = read_jsonl(f"{run.out}/log.jsonl")
    assert recorder.got == {record["step"]: scalars({**record, "step": None}) for record in log}
    assert {"tokens", "loss", "loss_by_position/0", "ranks/peak_gib/1", "tokens_per_second"} <= recorder.got[1].keys()
    families = client.text_string_to_metric_families(Path(run.out, "metrics.prom").read_text())
    found = {(sample.name, *sample.labels.items()): sample.value for family in families for sample in family.samples}
    assert found[("ultralong_train_step",)] == 4
    assert found[("ultralong_train_loss",)] == log[-1]["loss"]
    assert found[("ultralong_train_ranks_peak_gib", ("rank", "1"))] == 8
    assert found[("ultralong_train_loss_by_position", ("part", "0"))] == log[-1]["loss_by_position"][0]
    assert len(found) == len(recorder.got[4]) + 1  # the step


def _with_ranks(real):
    return lambda run, at: {**real(run, at), "ranks": {"peak_gib": [7, 8]}}


@pytest.mark.soak
def test_tensorboard_and_wandb_write_the_numbers_of_the_log(run, monkeypatch):
    """With the packages themselves, W&B offline."""
    pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", run.out)
    train(replace(run, trackers=("tensorboard", "wandb")), quiet=True)
    log = {record["step"]: scalars({**record, "step": None}) for record in read_jsonl(f"{run.out}/log.jsonl")}
    (events,) = Path(run.out).rglob("events.out.tfevents.*")
    board = accumulator.EventAccumulator(str(events))
    board.Reload()
    for name in log[4]:
        assert [event.value for event in board.Scalars(name)] == pytest.approx([log[at][name] for at in log])
    (offline,) = Path(run.out).rglob("*.wandb")
    history = {}
    for data in _wandb_records(offline.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[items["_step"]] = items
    assert all(history[at][name] == pytest.approx(value) for at in log for name, value in log[at].items())


def _wandb_records(data: bytes) -> list[bytes]:
    """Records of W&B's file: LevelDB's log, 32 KiB blocks of fragments: a checksum, a length, a type and bytes."""
    found, place, part = [], 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last fragment
            found.append(part)
            part = b""
    return found
