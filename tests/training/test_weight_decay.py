"""Weight decay is for matrices alone, and a checkpoint of a version that grouped parameters otherwise is resumed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, family_config, family_model
from safetensors.torch import load_file
from tiny_run import make_run

from ultralong.training import loop, step
from ultralong.training.config import OptimizerConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.model import make_optimizer


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_norms_and_sinks_do_not_decay(family):
    """gpt-oss has one tensor for the biases of all experts, of two dimensions."""
    model = family_model(family)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, none = make_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decay["weight_decay"], none["weight_decay"]) == (0.1, 0.0)
    assert {names[parameter] for parameter in [*decay["params"], *none["params"]]} == set(names.values())
    left_out = {names[parameter] for parameter in none["params"]}
    assert left_out == {name for name in names.values() if name.endswith(("bias", "sinks")) or "norm" in name}


def by_dimensions(model, config):
    """The optimizer as it was until 0.4: tensors of two dimensions decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@pytest.mark.parametrize("degree", [None, 1])
def test_a_checkpoint_with_other_groups_is_resumed_to_the_bit(tmp_path, tiny_tokenizer, monkeypatch, degree):
    monkeypatch.chdir(tmp_path)
    model = transformers.GptOssForCausalLM(family_config("GptOss", vocab_size=len(tiny_tokenizer)))
    config = make_run(tmp_path, model, tiny_tokenizer, save_every=2, parallel=ParallelConfig(fsdp_shard_degree=degree))
    config = replace(config, optimizer=replace(config.optimizer, weight_decay=0.0))  # so that groups change nothing
    with monkeypatch.context() as before:
        before.setattr(step, "make_optimizer", by_dimensions)
        train(config, quiet=True)
    wanted = load_file("run/model/model.safetensors")
    shutil.rmtree("run/checkpoints/step-0000004")
    shutil.rmtree("run/model")
    real, groups = loop._steps, []

    def steps(run, *arguments):
        groups.extend(
            {name: x for name, x in group.items() if name != "params"} for group in run.optimizer.param_groups
        )
        return real(run, *arguments)

    monkeypatch.setattr(loop, "_steps", steps)
    train(config, resume=True, quiet=True)
    assert [(group["betas"], group["eps"], group["weight_decay"]) for group in groups] == [((0.9, 0.95), 1e-8, 0.0)] * 2
    for name, tensor in load_file("run/model/model.safetensors").items():
        assert torch.equal(tensor, wanted[name]), name
