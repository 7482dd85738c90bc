"""Checkpoints that are written in the background: the same as the others, whatever training does meanwhile."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked import train_over
from kill_trials import kill_trials
from safetensors.torch import load_file
from tiny_run import make_run

from ultralong.checkpoints.distributed import changed_file
from ultralong.checkpoints.saving import background, host_copy
from ultralong.checkpoints.saving.shards import ShardWriter
from ultralong.checkpoints.verify import training_checkpoint_faults
from ultralong.planner.memory import host_memory
from ultralong.training import checkpoint, loop
from ultralong.training.config import DataSource, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.utils.files import read_json, read_jsonl
from ultralong.utils.local_ranks import run_ranks


@pytest.fixture
def run(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path, tiny_model, tiny_tokenizer, steps=6, save_every=2, keep=3)
    return replace(made, async_checkpoints=True)


def steps(out: str) -> list[int]:
    return [step for step, _ in checkpoint.RunFolder(Path(out)).checkpoints()]


def assert_same_end(one: str, other: str) -> None:
    first, second = (load_file(f"{out}/model/model.safetensors") for out in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    logs = [[(record["step"], record["loss"], record["grad_norm"]) for record in read_jsonl(f"{out}/log.jsonl")]
            for out in (one, other)]  # fmt: skip
    assert logs[0] == logs[1]


@pytest.fixture
def held(monkeypatch):
    """Writing in the background waits until `held` is set."""
    event, write = threading.Event(), ShardWriter.write_data

    def waits(self, *given):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(60)
        return write(self, *given)

    monkeypatch.setattr(ShardWriter, "write_data", waits)
    return event


def test_a_checkpoint_holds_its_step_though_it_is_written_after_the_next(run, held, monkeypatch):
    train(replace(run, out="alone", async_checkpoints=False), quiet=True)
    step, meanwhile = loop.training_step, []

    def made(state, at):
        record = step(state, at)
        meanwhile.append((at + 1, steps("run")))
        if at + 1 == 3:  # the copy of step 2 is still to be written
            held.set()
        return record

    monkeypatch.setattr(loop, "training_step", made)
    train(run, quiet=True)
    assert meanwhile[:3] == [(1, []), (2, []), (3, [])]
    assert steps("run") == [2, 4, 6]
    assert_same_end("alone", "run")
    for at in (4, 6):
        shutil.rmtree(f"run/checkpoints/step-000000{at}")
    assert training_checkpoint_faults(Path("run/checkpoints/step-0000002")) == (3, [])
    train(run, resume=True, quiet=True)
    assert read_jsonl("run/log.jsonl")[-1]["step"] == 6
    assert_same_end("alone", "run")


def test_a_write_that_fails_stops_the_run_at_its_next_step(run, monkeypatch):
    """The checkpoint before stays, no half of the failed one is taken for whole, and the run resumes from there."""
    train(replace(run, out="alone", async_checkpoints=False), quiet=True)
    real, calls, savers = checkpoint.save_file, [], []
    step, make = loop.training_step, background.BackgroundSaver

    def second_time(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    def after_the_failure(state, at):
        if at == 4:
            assert savers[0]._pending.exception(60) is not None
        return step(state, at)

    with monkeypatch.context() as patch:
        patch.setattr(background, "BackgroundSaver", lambda group: savers.append(make(group)) or savers[0])
        patch.setattr(checkpoint, "save_file", second_time)
        patch.setattr(loop, "training_step", after_the_failure)
        with pytest.raises(OSError, match="No space left on device; free some space"):
            train(run, quiet=True)
    assert read_jsonl("run/log.jsonl")[-1]["step"] == 5
    assert steps("run") == [2]
    assert "No space left" in read_json("run/stopped.json")["reason"]
    train(run, resume=True, quiet=True)
    assert_same_end("alone", "run")


def test_an_error_of_the_training_leaves_the_checkpoint_that_is_being_written(run, held, monkeypatch):
    step = loop.training_step

    def fails(state, at):
        if at == 2:
            threading.Timer(0.2, held.set).start()
            raise FloatingPointError("the loss is nan")
        return step(state, at)

    monkeypatch.setattr(loop, "training_step", fails)
    with pytest.raises(FloatingPointError):
        train(run, quiet=True)
    assert steps("run") == [2]
    assert not Path("run/checkpoints/unfinished").exists()


@pytest.mark.parametrize("shard", [None, 2])
def test_processes_write_what_they_would_have_waited_for(run, shard):
    parallel = ParallelConfig(context_parallel_size=2, fsdp_shard_degree=shard)
    run = replace(run, steps=3, save_every=1)
    both = [replace(run, out=out, parallel=parallel, async_checkpoints=out == "run") for out in ("alone", "run")]
    for one in both:
        train_over(one, 2)
    assert_same_end("alone", "run")
    for at in (2, 3):
        shutil.rmtree(f"run/checkpoints/step-000000{at}")
    assert changed_file(Path("run/checkpoints/step-0000001")) is None
    train_over(both[1], 2, resume=True)
    assert_same_end("alone", "run")


def _one_fails(rank: int, world: int, folder: Path) -> tuple[str, bool]:
    saver = background.BackgroundSaver(dist.new_group(backend="gloo"))
    processes = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=world, process_index=rank), is_main=rank == 0, barrier=dist.barrier
    )
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    if rank == 1:
        checkpoint.save_file = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    checkpoint.save(checkpoint.RunFolder(folder), processes, model, optimizer, 1, 2, saver)
    try:
        saver.wait()
    except OSError as error:
        return f"{error.errno} {error.strerror}", saver.failed
    finally:
        saver.close()
    return "nothing", saver.failed


def test_what_fails_on_one_process_fails_on_all(tmp_path):
    assert run_ranks(_one_fails, 2, tmp_path) == [(f"{errno.ENOSPC} No space left on device", False)] * 2
    assert checkpoint.RunFolder(tmp_path).checkpoints() == []


def _one_fails_at_once(rank, world, folder, name):
    processes = SimpleNamespace(
        is_main=rank == 0, accelerator=SimpleNamespace(process_index=rank, num_processes=world), barrier=dist.barrier
    )
    model = torch.nn.Linear(4, 4)
    if rank == FAILING[name]:
        setattr(checkpoint, name, lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "No rights", "there")))
    begin = time.monotonic()
    try:
        checkpoint.save(checkpoint.RunFolder(folder), processes, model, torch.optim.SGD(model.parameters()), 1, 2)
    except OSError as error:
        return type(error), str(error), time.monotonic() - begin < 20
    return None


FAILING = {"_emptied": 0, "save_file": 1, "record_hashes": 0}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_on_one_process_fails_on_all_that_wait_for_it(tmp_path, name):
    """A folder that can't be made, a file of one rank, the rename. The others waited until they were killed."""
    said = (PermissionError, f"[Errno {errno.EACCES}] No rights: 'there'", True)
    assert run_ranks(_one_fails_at_once, 2, tmp_path, name, timeout=30) == [said] * 2
    assert checkpoint.RunFolder(tmp_path).checkpoints() == []


def test_memory_for_copies_is_made_after_the_first_step(run, monkeypatch):
    """Not by the first checkpoint, which would be waited for, nor by any later one."""
    train(replace(run, out="alone", async_checkpoints=False), quiet=True)
    happened: list[object] = []
    step, make, start = loop.training_step, host_copy._Memory, background.BackgroundSaver.start
    monkeypatch.setattr(loop, "training_step", lambda *given: happened.append("step") or step(*given))
    monkeypatch.setattr(host_copy, "_Memory", lambda *given: happened.append("memory") or make(*given))
    monkeypatch.setattr(background.BackgroundSaver, "start", lambda *x: happened.append("save") or start(*x))
    train(run, quiet=True)
    assert happened.count("memory") == 1
    assert happened.index("step") < happened.index("memory") < happened.index("save")
    assert_same_end("alone", "run")


def test_a_run_without_memory_for_copies_ends_at_its_first_step(run, monkeypatch):
    """Hours may lie between the first step and the first checkpoint."""

    def refused(*given):
        raise MemoryError("CUDA could not lock 1.0 GiB")

    monkeypatch.setattr(host_copy, "_Memory", refused)
    with pytest.raises(MemoryError, match="could not lock"):
        train(replace(run, save_every=5), quiet=True)
    assert read_jsonl("run/log.jsonl")[-1]["step"] == 1


def test_the_plan_counts_the_copy(run):
    def host(config: TrainConfig, inputs: int) -> dict[str, float]:
        facts = SimpleNamespace(config=config, placed=(0, 0, inputs), input_bytes=1e10, shard=2)
        return {line.name: line.value for line in host_memory(SimpleNamespace(**vars(facts), parameters=counted))}

    counted, name = SimpleNamespace(trained=8e9), "model and states for checkpoints in the background, pinned"
    waiting = replace(run, async_checkpoints=False)
    # A float32 parameter and AdamW's two states, sharded over two processes.
    assert host(run, 0)[name] == 12 * 8e9 / 2
    assert name not in host(waiting, 0)
    assert sum(host(run, 0).values()) == sum(host(waiting, 0).values())  # what saving copies beyond it is less
    # Offloaded activations are not released for a copy that is there already.
    assert sum(host(run, 10).values()) == sum(host(waiting, 10).values()) + 12 * 8e9 / 2


@pytest.mark.soak
def test_a_run_that_is_killed_while_it_saves_in_the_background_ends_as_one_that_was_not(run, tmp_path):
    there = replace(
        run, steps=24, save_every=2, keep=2, model=str(tmp_path / "model"), data=(DataSource(str(tmp_path / "rows")),)
    )
    found = kill_trials(there, tmp_path, kills=2, seed=5, moments=("save",))
    assert (found["differences"], found["survivors"]) == ([], 0)
    assert found["counts"]["killed"] >= 1
