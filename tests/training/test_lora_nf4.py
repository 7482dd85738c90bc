"""QLoRA: over frozen matrices in 4 bits, losses and every adapter gradient are those of LoRA over what the codes say.

torchao is no part of the development extra; with it on the path (pip install 'ultralong[optim]') these run.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import train_over
from safetensors.torch import load_file
from test_lora import IN_TILES, WAYS, made, watched  # noqa: F401
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from ultralong.planner import plan
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.four_bits import BYTES, dequantised, quantised
from ultralong.training.adapters.lora import check_lora
from ultralong.training.config import MemoryConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.parallel import process_problem
from ultralong.training.run_folder import RunFolder
from ultralong.utils.files import read_jsonl

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install 'ultralong[optim]'"
)
ONE = ParallelConfig(fsdp_shard_degree=1)
SHARDED = ("ulysses, sharded, tiled layers", "ring, sharded", "gathered, sharded", "rows apart, sharded")


@pytest.fixture
def four(made):  # noqa: F811
    """The same run over weights in 4 bits, with adapters at all linear modules of which some have none."""
    lora = replace(made.lora, base="nf4", targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    return replace(made, lora=lora, parallel=ONE)


@pytest.fixture
def over_what_codes_say(four, tmp_path):
    """Plain LoRA over a checkpoint of the dequantised weights."""
    model = AutoModelForCausalLM.from_pretrained(four.model, dtype=torch.float32)
    changed = 0
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            codes = quantised(module.weight.detach())
            assert 0 < (dequantised(codes, torch.float32) - module.weight).norm() < 0.12 * module.weight.norm()
            module.weight.data = dequantised(codes, torch.float32)
            changed += 1
    assert changed == 2 * 7
    shutil.copytree(four.model, tmp_path / "dequantised")
    model.save_pretrained(tmp_path / "dequantised")
    return replace(four, model=str(tmp_path / "dequantised"), lora=replace(four.lora, base="full"))


@needs_torchao
def test_losses_and_every_gradient_are_those_of_lora_over_the_dequantised_weights(
    four,
    over_what_codes_say,
    watched,  # noqa: F811
    tmp_path,
):
    plain = replace(over_what_codes_say, out=str(tmp_path / "plain"), parallel=ParallelConfig())
    train(plain, quiet=True)
    wanted, log = torch.load(tmp_path / "plain" / "gradients.pt"), read_jsonl(tmp_path / "plain" / "log.jsonl")
    ways = {
        "one process": (1, ONE, MemoryConfig(activation_checkpointing=True)),
        "one process, tiled layers": (1, ONE, IN_TILES),
        **{way: WAYS[way] for way in SHARDED},
    }
    for way, (processes, parallel, memory) in ways.items():
        out = tmp_path / way.replace(" ", "-")
        config = replace(four, out=str(out), parallel=parallel, memory=memory)
        train(config, quiet=True) if processes == 1 else train_over(config, processes)
        found, ours = torch.load(out / "gradients.pt"), read_jsonl(out / "log.jsonl")
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in log], rel=2e-5), way
        assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in log], rel=1e-4), way
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert grad.norm() > 0, name
            assert (found[name] - grad).norm() <= 2e-5 * grad.norm(), (way, name)


@needs_torchao
def test_a_run_resumes_to_the_bit_and_is_merged_into_the_base_as_it_came(four, tmp_path):
    from ultralong import api

    config = replace(
        four,
        out=str(tmp_path / "run"),
        steps=4,
        save_every=2,
        parallel=ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2),
    )
    train_over(config, 2)
    again = replace(config, out=str(tmp_path / "again"))
    shutil.copytree(config.out, again.out, ignore=shutil.ignore_patterns("adapter", "result.json"))
    shutil.rmtree(RunFolder(Path(again.out)).checkpoint(4))
    train_over(again, 2, resume=True)
    first, second = (load_file(f"{run.out}/adapter/adapter_model.safetensors") for run in (config, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    stored = torch.distributed.checkpoint.FileSystemReader(RunFolder(Path(config.out)).checkpoint(4))
    names = [name for name in stored.read_metadata().state_dict_metadata if name.startswith("model.")]
    assert names
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert "in 4 bits (nf4)" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    api.merge([f"{config.out}/adapter"], tmp_path / "merged")
    merged, base = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "merged", config.model))
    a, b = (first[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    added = merged.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(added, 2 * b @ a, rtol=1e-3, atol=1e-6)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_a_plan_counts_codes(four):
    full = plan(replace(four, lora=replace(four.lora, base="full")), 1).to_dict()["lines"]
    codes = plan(four, 1).to_dict()["lines"]
    frozen, frozen_full, held = (
        sum(line["value"] for line in lines if line["name"].startswith(f"tensors: {name}"))
        for lines, name in ((codes, "frozen parameters"), (full, "frozen parameters"), (codes, "frozen matrices"))
    )
    model = AutoModelForCausalLM.from_pretrained(four.model)
    inside = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert held == pytest.approx(BYTES * inside)
    assert frozen_full - frozen == pytest.approx(4 * inside)


def test_what_can_not_be_in_four_bits_is_refused_by_name(four, tmp_path):
    with pytest.raises(ValueError, match=r"nf4 is for lora.rank above 0"):
        LoRAConfig(base="nf4")
    config = AutoConfig.from_pretrained(four.model)
    with pytest.raises(ValueError, match=r"set parallel.fsdp_shard_degree \(1 on one GPU\)"):
        check_lora(config, replace(four, parallel=ParallelConfig()), True)
    with pytest.raises(ValueError, match=r"nf4 can't cut model.layers.0.self_attn.\w+.* into 3 shards"):
        check_lora(config, replace(four, parallel=ParallelConfig(fsdp_shard_degree=3)), True)
    said = process_problem(replace(four, global_batch_size=2), 2)
    assert said is not None
    assert "fsdp_shard_degree is 1, but this run has 2 processes. --set parallel.fsdp_shard_degree=2" in said
    experts = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    lora = replace(four.lora, targets=("q_proj",))
    with pytest.raises(ValueError, match=r"nf4 is for linear modules, and mlp.experts.\w+ is 3-dimensional: experts"):
        check_lora(experts, replace(four, lora=lora), True)
