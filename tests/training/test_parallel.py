"""Sharded parameters (FSDP2) and the memory plan: the same run, whoever holds what."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from forked import train_over
from test_train import config, curve, made, weights  # noqa: F401 - fixtures
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ultralong.training import loop
from ultralong.training.config import DataSource, MemoryConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.parallel import connect
from ultralong.training.run_folder import RunFolder
from ultralong.training.watch import exchange
from ultralong.utils.local_ranks import RankFailed, run_ranks

PLANS = {
    "recomputed": MemoryConfig(activation_checkpointing=True),
    "attention kept": MemoryConfig(activation_checkpointing=True, attention_outputs_on_gpu=-1),
    "attention on the host, inputs too": MemoryConfig(
        activation_checkpointing=True,
        attention_outputs_on_gpu=1,
        attention_outputs_offloaded=-1,
        layer_inputs_offloaded=-1,
        loss_tile=50,
    ),
    "written out, recomputed": MemoryConfig(activation_checkpointing=True, layer_tile=48),
    "written out, kept": MemoryConfig(
        activation_checkpointing=True, layer_tile=48, attention_outputs_on_gpu=-1, checkpoint_every=2
    ),
    "written out, on the host": MemoryConfig(
        activation_checkpointing=True,
        layer_tile=48,
        attention_outputs_on_gpu=1,
        attention_outputs_offloaded=1,
        layer_inputs_offloaded=1,
        checkpoint_every=3,
        loss_tile=50,
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: train on one process, once for all tests that ask for the same run; returns its config."""
    done = {}

    def get(config):  # noqa: F811
        key = repr(replace(config, out="one for all"))
        if key not in done:
            done[key] = replace(config, out=str(tmp_path_factory.mktemp("trained") / "run"))
            train(done[key], quiet=True)
        return done[key]

    return get


def run(config, folder, processes, **changes):  # noqa: F811
    changed = replace(config, out=str(folder / "run"), **changes)
    train_over(changed, processes)
    return changed


def assert_same_curves(a, b, steps):
    assert len(curve(a)) == steps
    assert curve(a, "targets") == curve(b, "targets")
    assert curve(a) == pytest.approx(curve(b), rel=5e-5)
    assert curve(a, "grad_norm") == pytest.approx(curve(b, "grad_norm"), rel=5e-4)


SPLITS = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 2), (4, 4, 4), (4, 2, 2)]  # processes, context parallel, sharded


@pytest.mark.parametrize(
    "split",
    [pytest.param(split, id="-".join(map(str, split)), marks=[pytest.mark.soak] * (split[0] != 2)) for split in SPLITS],
)
def test_twenty_steps_are_the_same_however_the_work_is_shared(config, made, tmp_path, trained, split):  # noqa: F811
    """Sequence-parallel 1, 2, 4 and FSDP2 over 1, 2, 4 processes, replicated too: one curve of losses and norms."""
    processes, sequence, shard = split
    kind = "masked" if processes == 4 else "rows"
    one = trained(replace(config, steps=20, save_every=0, data=(DataSource(str(made / kind)),)))
    many = run(
        one,
        tmp_path,
        processes,
        parallel=ParallelConfig(context_parallel_size=sequence, fsdp_shard_degree=shard),
        memory=PLANS["written out, on the host"] if sequence == 2 else MemoryConfig(),
    )
    assert_same_curves(many, one, 20)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(many)[name], weight, rtol=2e-3, atol=2e-4)


MICRO_BATCHES = {
    "replicas": (2, ParallelConfig(), 1),  # one bucket, exchanged once a step
    "shards": (2, ParallelConfig(fsdp_shard_degree=2), 3 * 4),  # two layers and the rest, in each of four passes
    "replicas of shards": (4, ParallelConfig(fsdp_shard_degree=2), 3 * 2),
}


@pytest.mark.parametrize("way", MICRO_BATCHES)
def test_micro_batches_exchange_no_more_than_they_must(config, made, tmp_path, trained, way, monkeypatch):  # noqa: F811
    """Replicas once a step; shards in each pass, so that none holds gradients in full. Rows differ in targets."""
    processes, parallel, exchanges = MICRO_BATCHES[way]
    calls, build, real, step = [], loop.build_run, exchange._reduce_scatter, loop.training_step

    def built(*arguments):
        run = build(*arguments)
        if isinstance(run.model, DistributedDataParallel):
            run.model.register_comm_hook(None, lambda _, bucket: calls.append(1) or allreduce_hook(None, bucket))
        return run

    def counted(run, number):
        calls.clear()
        return step(run, number) | {"exchanges": len(calls)}

    monkeypatch.setattr(loop, "build_run", built)
    monkeypatch.setattr(loop, "training_step", counted)
    monkeypatch.setattr(exchange, "_reduce_scatter", lambda *args, **options: calls.append(1) or real(*args, **options))
    chat = replace(config, data=(DataSource(str(made / "chat")),), global_batch_size=8, steps=3)
    many = run(replace(chat, micro_batch_size=1), tmp_path, processes, parallel=parallel)
    assert curve(many, "exchanges") == [exchanges] * 3
    assert_same_curves(many, trained(replace(chat, micro_batch_size=8)), 3)


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_kept_moved_or_recomputed_changes_nothing(config, made, tmp_path, trained, plan):  # noqa: F811
    for kind in ("rows", "masked"):
        plain = trained(replace(config, save_every=0, data=(DataSource(str(made / kind)),)))
        planned = replace(plain, memory=PLANS[plan], out=str(tmp_path / f"{kind} planned"))
        train(planned, quiet=True)
        assert_same_curves(planned, plain, config.steps)


@pytest.mark.parametrize("then", [(2, 1), pytest.param((4, 2), marks=pytest.mark.soak)])
def test_a_checkpoint_goes_on_on_another_mesh(config, tmp_path, then):  # noqa: F811
    """Saved by one process, loaded by two that share the row and the parameters, then by others."""
    processes, sequence = then
    whole = replace(config, out=str(tmp_path / "whole"), steps=9, keep=9)
    train(whole, quiet=True)
    meshes = (
        (3, 2, ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2)),
        (6, processes, ParallelConfig(context_parallel_size=sequence, fsdp_shard_degree=processes)),
    )
    before = whole
    for step, processes, parallel in meshes:
        after = replace(whole, out=str(tmp_path / f"from {step}"), parallel=parallel)
        shutil.copytree(before.out, after.out, ignore=shutil.ignore_patterns("model", "result.json"))
        for number, folder in RunFolder(tmp_path / f"from {step}").checkpoints():
            if number > step:
                shutil.rmtree(folder)
        train_over(after, processes, resume=True)
        assert_same_curves(after, whole, 9)
        before = after


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"parallel": ParallelConfig(fsdp_shard_degree=2)},
            "parallel.fsdp_shard_degree is 2, but this run has 1 process",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(config, change, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        train(replace(config, **change), quiet=True)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"attention_outputs_on_gpu": 1}, "set memory.activation_checkpointing to true"),
        ({"activation_checkpointing": True, "checkpoint_every": 4}, "set memory.layer_tile"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, said):
    with pytest.raises(ValueError, match=said):
        MemoryConfig(**plan)


def fail_on_rank_1(rank, world, config):  # noqa: F811
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    with connect(config) as processes:
        assert processes.accelerator.num_processes == 2
        if rank == 1:
            raise RuntimeError("the device has fallen off the bus")


def test_an_error_names_its_rank_and_host(config):  # noqa: F811
    with pytest.raises(RankFailed) as caught:
        run_ranks(fail_on_rank_1, 2, config)
    said = f"RuntimeError: the device has fallen off the bus\nThis is rank 1 of 2, on host {socket.gethostname()}."
    assert said in str(caught.value)
    assert "rank 0 of 2" not in str(caught.value)
