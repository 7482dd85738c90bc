"""A rank whose core other programs want is not a slow rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from forked import train_over
from tiny_run import before_reading, make_run

from ultralong.attention import collectives
from ultralong.training.config import ParallelConfig
from ultralong.training.watch import held_back
from ultralong.utils.files import read_jsonl

BURN = "import os; os.sched_setaffinity(0, {{{core}}}); print('burns', flush=True)\nwhile True: pass"


@pytest.fixture
def cores():
    """A core that two other programs want, and another one."""
    if held_back.queued_seconds() == 0.0 or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores, and a Linux that counts how long a thread waits for one")
    busy, free = sorted(os.sched_getaffinity(0))[:2]
    others = [subprocess.Popen([sys.executable, "-c", BURN.format(core=busy)], stdout=subprocess.PIPE) for _ in "ab"]
    for each in others:
        assert each.stdout.readline() == b"burns\n"
    yield busy, free
    for each in others:
        each.kill()
        each.communicate()


def burn(seconds: float) -> None:
    """Work for so long on a core, however long it takes to get it."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_time_in_which_others_had_the_core_is_counted_once(cores):
    """In a collective it is waiting, outside of one neither waiting nor work."""
    clock, ours = held_back.HeldBackClock(torch.device("cpu")), os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[:1])
    try:
        with clock.running():
            begin, cpu, queued = time.perf_counter(), time.thread_time(), held_back.queued_seconds()
            with collectives.waiting("all-to-all"):
                burn(0.2)
            inside = held_back.queued_seconds() - queued
            burn(0.2)
            seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
    finally:
        os.sched_setaffinity(0, ours)
    held, waited = clock.take_held_back(), clock.take()
    assert min(inside, held) > 0.1, "the core was ours alone: nothing was tried"
    assert waited == pytest.approx(inside + cpu / 2, abs=0.05)
    assert seconds - waited - held == pytest.approx(cpu / 2, abs=0.05)
    assert clock.take_held_back() < 0.05


def test_a_rank_whose_core_others_want_is_not_blamed(
    tmp_path, make_tiny_model, tiny_tokenizer, cores, monkeypatch, capfd
):
    """Beside other load papermill refused notebook 07 for a note that was the scheduler's doing."""
    monkeypatch.chdir(tmp_path)
    two = ParallelConfig(context_parallel_size=2)
    config = make_run(tmp_path, make_tiny_model(), tiny_tokenizer, steps=4, global_batch_size=2, parallel=two)
    for rank in (0, 1):
        before_reading(monkeypatch, rank, 0, lambda core=cores[1 - rank]: (os.sched_setaffinity(0, {core}), burn(0.3)))
    train_over(config, 2)
    assert "is slow" not in capfd.readouterr().err
    log = read_jsonl(f"{config.out}/log.jsonl")
    held = [r["seconds"] - r["ranks"]["compute_seconds"][1] - r["ranks"]["waiting_seconds"][1] for r in log]
    assert min(held[1:]) > 0.2, "nobody else wanted the core: nothing was tried"
