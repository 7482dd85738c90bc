"""A run folder of version 0.3 resumes: its config keys are read under their old names, its checkpoints are the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import yaml
from test_train import config, curve, made, weights  # noqa: F401 - fixtures

from ultralong.training import loop
from ultralong.training.config import MemoryConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.training.run_folder import RunFolder
from ultralong.utils import settings

# What 0.3 wrote to config.yaml, by what is written today.
OLD_KEYS = {
    (): {
        "global_batch_size": "rows_per_step",
        "micro_batch_size": "rows_at_once",
        "loss_spike_threshold": "largest_jump",
    },
    ("optimizer",): {"state_precision": "states"},
    ("parallel",): {
        "context_parallel_size": "sequence",
        "fsdp_shard_degree": "shard",
        "reshard_after_forward": "reshard",
        "head_chunks": "stages",
    },
    ("memory",): {
        "activation_checkpointing": "checkpoint_layers",
        "attention_outputs_on_gpu": "attention_kept",
        "attention_outputs_offloaded": "attention_host",
        "layer_inputs_offloaded": "inputs_host",
        "checkpoint_every": "inputs_every",
    },
}
NEWER_KEYS = ("base_model", "length")  # 0.3 had none of these
PARAMETERS = {"model.model.model.embed_tokens.weight", "model.model.model.layers.0.self_attn.q_proj.weight"}
STATES = {"exp_avg", "exp_avg_sq", "step"}


def write_old_config(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    for name in NEWER_KEYS:
        del values[name]
    for parents, names in OLD_KEYS.items():
        place = values
        for parent in parents:
            place = place[parent]
        for new, old in names.items():
            place[old] = place.pop(new)
    path.write_text(yaml.safe_dump(values))


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):  # noqa: F811
    """A run that is not stopped, and the folder of one that was, as 0.3 would have left it."""
    config = replace(
        config,
        micro_batch_size=2,
        loss_spike_threshold=2.5,
        parallel=ParallelConfig(reshard_after_forward=False),
        memory=MemoryConfig(activation_checkpointing=True, layer_tile=48, attention_outputs_on_gpu=1),
    )
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, quiet=True)
    append = loop.append_jsonl

    def stop_after_five(path, record):
        append(path, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_jsonl", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    write_old_config(Path(config.out) / "config.yaml")
    return whole, Path(config.out)


def test_a_run_of_0_3_resumes_to_the_same_losses(stopped, capsys):
    whole, folder = stopped
    capsys.readouterr()
    old = settings.load(TrainConfig, folder / "config.yaml")
    assert old == replace(whole, out=str(folder))
    notes = capsys.readouterr().err
    for parents, names in OLD_KEYS.items():
        for new, name in names.items():
            where = "".join(f"{parent}: " for parent in parents)
            assert f"config.yaml: {where}{name!r} is now called {new!r}" in notes
    train(old, resume=True, quiet=True)
    assert curve(old) == curve(whole)
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(old)[name]), name
    written = (folder / "config.yaml").read_text()
    assert "global_batch_size" in written
    assert "rows_per_step" not in written


def test_a_checkpoint_has_the_files_and_keys_of_0_3(stopped):
    _, folder = stopped
    ((step, saved),) = RunFolder(folder).checkpoints()
    assert (step, saved.name) == (3, "step-0000003")
    assert sorted(file.name for file in saved.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "random-0.safetensors",
        "state.json",
    ]
    keys = set(dcp.FileSystemReader(saved).read_metadata().state_dict_metadata)
    assert keys >= PARAMETERS
    for name in PARAMETERS:
        assert keys >= {f"optimizer.state.{name.removeprefix('model.')}.{state}" for state in STATES}
    assert {key.split(".")[0] for key in keys} == {"model", "optimizer"}
    assert {key.split(".")[1] for key in keys if key.startswith("optimizer.")} == {"state", "param_groups"}


def test_without_the_old_names_it_would_not_resume(stopped, monkeypatch):
    """So that the first test fails when the mapping is removed."""
    _, folder = stopped
    monkeypatch.setattr(TrainConfig, "RENAMED", {})
    with pytest.raises(ValueError, match=r"unknown key '(rows_per_step|rows_at_once|largest_jump)'"):
        settings.load(TrainConfig, folder / "config.yaml")
    shutil.rmtree(folder)
