"""LoRA: losses and every adapter gradient are those of peft on transformers' eager attention, whoever holds what."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, TILED, family_model, row
from forked import train_over
from safetensors.torch import load_file
from test_families import PLANS, one_pass
from tiny_run import make_run
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong import api
from ultralong.cli import main
from ultralong.training import model as training_model
from ultralong.training import step
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import add_adapters, check_lora
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, MemoryConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.parallel import full_tensor
from ultralong.training.run_folder import RunFolder
from ultralong.utils.files import read_jsonl

LORA = LoRAConfig(rank=4, alpha=8.0, train_embeddings=True, train_norms=True)
IN_TILES = MemoryConfig(
    activation_checkpointing=True, layer_tile=24, loss_tile=50, attention_outputs_on_gpu=1,
    attention_outputs_offloaded=1, layer_inputs_offloaded=1, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """The config of a run with LoRA on a tiny model with a head of its own."""
    folder = tmp_path_factory.mktemp("lora")
    model = make_tiny_model(vocab_size=len(tiny_tokenizer), tie_word_embeddings=False)
    config = make_run(folder, model, tiny_tokenizer)
    return replace(
        config,
        model=str(folder / "model"),
        data=(DataSource(str(folder / "rows")),),
        lora=LORA,
        steps=3,
        optimizer=replace(config.optimizer, weight_decay=0.1),
    )


def start(model):
    """Adapters that change what the model computes from the first step on: peft starts with a product of zero."""
    generator = torch.Generator().manual_seed(5)
    trained = sorted((name.removeprefix("base_model.model."), p) for name, p in model.named_parameters())
    for name, parameter in trained:
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    return model


@pytest.fixture
def watched(monkeypatch):
    """Runs start with `start`, and write the gradients of their first step into their folder."""
    add, update = training_model.add_adapters, step._update

    def recorded(run, number):
        if number == 0:
            names = {name.rpartition("module.")[2]: p for name, p in run.model.named_parameters() if p.requires_grad}
            found = {name.removeprefix("model."): full_tensor(p.grad) for name, p in names.items()}
            if run.processes.is_main:
                torch.save(found, run.folder.path / "gradients.pt")
        return update(run, number)

    monkeypatch.setattr(training_model, "add_adapters", lambda *arguments: start(add(*arguments)))
    monkeypatch.setattr(step, "_update", recorded)


@pytest.fixture(scope="module")
def reference(made):
    """What peft and transformers alone do: losses, gradient norms, and the gradients of the first step."""
    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32, attn_implementation="eager")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
    )
    model = start(peft.get_peft_model(model, settings)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=made.optimizer.lr, betas=made.optimizer.betas, eps=made.optimizer.eps)
    order, losses, norms = RowOrder.of_run(made), [], []
    for number in range(made.steps):
        batch = order.batch(2 * number, 2)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        if number == 0:
            first = {
                name.removeprefix("base_model.model."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, first


WAYS = {
    "one process": (1, ParallelConfig(), MemoryConfig()),
    "one process, tiled layers, offloading": (1, ParallelConfig(), IN_TILES),
    "ulysses, sharded, tiled layers": (
        2,
        ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2, scheme="ulysses"),
        IN_TILES,
    ),
    "gathered, replicated": (
        2,
        ParallelConfig(context_parallel_size=2, scheme="gathered"),
        MemoryConfig(activation_checkpointing=True, layer_inputs_offloaded=-1),
    ),
    "ring, sharded": (
        2,
        ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2, scheme="ring"),
        MemoryConfig(activation_checkpointing=True),
    ),
    "ring, replicated, tiled layers": (2, ParallelConfig(context_parallel_size=2, scheme="ring"), IN_TILES),
    "gathered, sharded": (
        2,
        ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2, scheme="gathered"),
        MemoryConfig(),
    ),
    "rows apart, sharded": (2, ParallelConfig(fsdp_shard_degree=2), MemoryConfig()),
    "ulysses, four": (4, ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2), MemoryConfig()),
}
SHORT = (
    "one process",
    "one process, tiled layers, offloading",
    "ulysses, sharded, tiled layers",
    "gathered, replicated",
)


@pytest.mark.parametrize("way", [x if x in SHORT else pytest.param(x, marks=pytest.mark.soak) for x in WAYS])
def test_losses_and_every_gradient_are_those_of_peft(made, reference, watched, tmp_path, way):
    processes, parallel, memory = WAYS[way]
    config = replace(made, out=str(tmp_path / "run"), parallel=parallel, memory=memory)
    train(config, quiet=True) if processes == 1 else train_over(config, processes)
    losses, norms, gradients = reference
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [record["loss"] for record in log] == pytest.approx(losses, rel=2e-5)
    assert [record["grad_norm"] for record in log] == pytest.approx(norms, rel=1e-4)
    found = torch.load(tmp_path / "run" / "gradients.pt")
    assert found.keys() == gradients.keys()
    for name, grad in gradients.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= 2e-5 * grad.norm(), name


@pytest.mark.parametrize(
    "family", [x if x in ("Gemma3", "GptOss") else pytest.param(x, marks=pytest.mark.soak) for x in FAMILIES]
)
def test_adapters_and_norms_of_every_family_are_those_of_eager_transformers(family):
    """Windows, sinks, experts and unusual norms, their layers in tiles where there are tiles for them."""
    model = family_model(family)
    lora = LoRAConfig(rank=3, targets=("q_proj", "v_proj", "o_proj"), train_norms=True)
    model = start(add_adapters(model, lora))
    alone = copy.deepcopy(model)
    alone.set_attn_implementation("eager")
    ids, labels = row()
    wanted = cross_entropy(alone(ids, use_cache=False).logits[0], labels[0], reduction="sum")
    wanted.backward()
    loss, found = one_pass(model, PLANS["tiles" if family in TILED else "checkpointed"])
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert {name for name, grad in found.items() if grad is not None} == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """A run of four steps on two processes that share rows and parameters, with checkpoints; its config."""
    config = replace(
        made,
        out=str(tmp_path_factory.mktemp("finished") / "run"),
        steps=4,
        save_every=2,
        parallel=ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2),
    )
    train_over(config, 2)
    return config


def adapter(config):
    return load_file(f"{config.out}/adapter/adapter_model.safetensors")


def test_a_run_resumed_on_one_process_ends_in_the_same_adapter(finished, tmp_path):
    """To the bit on as many processes, and its checkpoints hold no frozen weight."""
    for processes, exact in ((2, True), (1, False)):
        again = replace(finished, out=str(tmp_path / str(processes)))
        again = again if exact else replace(again, parallel=ParallelConfig())
        shutil.copytree(finished.out, again.out, ignore=shutil.ignore_patterns("adapter", "result.json"))
        shutil.rmtree(RunFolder(Path(again.out)).checkpoint(4))
        train_over(again, 2, resume=True) if exact else train(again, resume=True, quiet=True)
        for name, tensor in adapter(finished).items():
            found = adapter(again)[name]
            assert torch.equal(found, tensor) if exact else torch.allclose(found, tensor, rtol=1e-3, atol=2e-5), name
    stored = torch.distributed.checkpoint.FileSystemReader(RunFolder(Path(finished.out)).checkpoint(4))
    names = [name for name in stored.read_metadata().state_dict_metadata if name.startswith("model.")]
    assert len(names) == 2 * 4 * 2 + 1 + 2 * 2 + 1, "A and B of four modules, embedding, norms"
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_merged_is_what_peft_merges_and_what_the_run_trained(finished, tmp_path, capsys):
    main(["merge", f"{finished.out}/adapter", "--out", str(tmp_path / "merged"), "--quiet"])
    assert "14 tensors changed by the adapter" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(finished.model)
    opened = peft.PeftModel.from_pretrained(base, f"{finished.out}/adapter")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        beside = opened(ids).logits
        expected = opened.merge_and_unload()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, beside, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(finished.model)(ids).logits, beside, atol=1e-3)
    states = merged.state_dict()
    assert states.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(states[name], tensor), name
    assert peft.PeftConfig.from_pretrained(f"{finished.out}/adapter").inference_mode
    facts = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert facts["models"] == [finished.model, f"{finished.out}/adapter"]


def test_merges_that_cannot_be_are_refused(finished, tmp_path):
    adapter = f"{finished.out}/adapter"
    for models, weights in (([finished.model, finished.model, adapter], ()), ([finished.model, adapter], (0.5, 0.5))):
        with pytest.raises(ValueError, match="merged into its base alone"):
            api.merge(models, tmp_path / "merged", weights)
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone"}))
    with pytest.raises(ValueError, match=r"trained on gone, which is not there.*Name the base"):
        api.merge([moved], tmp_path / "merged")
    assert api.merge([finished.model, moved], tmp_path / "merged").tensors == 14


@pytest.mark.parametrize(
    ("lora", "changes", "said"),
    [
        ({"targets": ("q_proj", "wq")}, {}, "'wq' is no linear module inside the layers of LlamaForCausalLM"),
        ({"targets": ("lm_head",)}, {}, "'lm_head' is no linear module inside the layers"),
        ({"dropout": 0.1}, {"memory": IN_TILES}, r"lora.dropout \(0.1\) would draw other numbers"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_the_start(made, tmp_path, lora, changes, said):
    with pytest.raises(ValueError, match=said):
        train(replace(made, out=str(tmp_path / "run"), lora=replace(LORA, **lora), **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_settings_that_mean_nothing_are_refused(made):
    with pytest.raises(ValueError, match=r"are for lora.rank above 0"):
        LoRAConfig(train_norms=True)
    with pytest.raises(ValueError, match="all-linear alone"):
        LoRAConfig(rank=4, targets=("all-linear", "q_proj"))
    with pytest.raises(ValueError, match="compile and lora don't go together"):
        replace(made, compile=True)


def test_what_a_config_tells_is_refused_or_counted(made):
    config = AutoConfig.from_pretrained(made.model)
    assert "o_proj: 3,584 parameters are trained (2.78%)" in check_lora(config, replace(made, lora=LoRAConfig(4)), True)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\).*QLoRA"):
        check_lora(config, made, True)
    tied = AutoConfig.from_pretrained(made.model, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="head is its embedding"):
        check_lora(tied, made, True)
