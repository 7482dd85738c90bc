"""transformers' Trainer and TRL's SFTTrainer on two processes that share each row: the curves of our own loop."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import make_run
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import ultralong
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource
from ultralong.training.huggingface import (
    ContextParallelCallback,
    ContextParallelCollator,
    packed_rows,
    shared_rows,
    tile_loss,
    trainer_arguments,
)
from ultralong.training.loop import train
from ultralong.utils.files import read_jsonl
from ultralong.utils.local_ranks import run_ranks

STEPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A run of our own loop on one process: its config, losses and gradient norms."""
    folder = tmp_path_factory.mktemp("trainers")
    config = make_run(folder, make_tiny_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer, steps=STEPS)
    config = replace(
        config, model=str(folder / "model"), data=(DataSource(str(folder / "rows")),), out=str(folder / "run")
    )
    train(config, quiet=True)
    log = read_jsonl(folder / "run" / "log.jsonl")
    return config, [record["loss"] for record in log], [record["grad_norm"] for record in log]


def arguments(config, kind=TrainingArguments, **changes):
    """What our loop's config is in a trainer's arguments."""
    optimizer = config.optimizer
    given = {
        "output_dir": config.out, "max_steps": STEPS, "gradient_accumulation_steps": 2, "learning_rate": optimizer.lr,
        "lr_scheduler_type": "constant", "weight_decay": optimizer.weight_decay, "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1], "max_grad_norm": optimizer.clip_norm, "logging_steps": 1, "bf16": False,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": config.seed,
    }  # fmt: skip
    return kind(**(given | trainer_arguments() | changes))


def made_trainer(config, size, kind, scheme="auto", **changes):
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, attn_implementation="ultralong")
    collator = ContextParallelCollator(model.config, size, scheme)
    rows = shared_rows(packed_rows(config.data, STEPS * config.global_batch_size), size)
    callbacks = [ContextParallelCallback(collator)]
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        args = arguments(config, SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, **changes)
        return SFTTrainer(model, args, data_collator=collator, train_dataset=rows, callbacks=callbacks)
    tile_loss(model, 24)
    return Trainer(model, arguments(config, **changes), collator, rows, callbacks=callbacks)


def on_rank(rank, world, config, kind, scheme):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    trainer = made_trainer(config, world, kind, scheme)
    trainer.train()
    if rank == 0:
        log = [record for record in trainer.state.log_history if "grad_norm" in record]
        Path(config.out).mkdir(exist_ok=True)
        Path(config.out, "log.json").write_text(json.dumps(log))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("trainer", "ulysses"),
        ("trl", "gathered"),
        pytest.param("trainer", "ring", marks=pytest.mark.soak),
        pytest.param("trl", "ulysses", marks=pytest.mark.soak),
    ],
)
def test_two_processes_that_share_rows_train_as_our_loop(made, tmp_path, kind, scheme):
    config, losses, norms = made
    run_ranks(on_rank, 2, replace(config, out=str(tmp_path / "run")), kind, scheme)
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert [record["loss"] for record in log] == pytest.approx(losses, rel=2e-5)
    assert [record["grad_norm"] for record in log] == pytest.approx(norms, rel=2e-4)


def test_documents_of_another_librarys_rows_stay_apart(made):
    """TRL's packing writes `seq_lengths`, and labels that are not shifted: no target lies in another document."""
    config, _, _ = made
    collator = ContextParallelCollator(AutoConfig.from_pretrained(config.model))
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, 9], "seq_lengths": [3, 2]}
    batch = collator([row])
    assert batch["shift_labels"].tolist() == [[-100, 7, -100, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["attention_context"].boundaries == (0, 3, 5)
    batch = collator([{"input_ids": [5, 6, 7]}])
    assert batch["shift_labels"].tolist() == [[6, 7, -100]]
    assert batch["attention_context"].boundaries is None


def test_each_row_comes_as_often_as_processes_share_it(made):
    config, _, _ = made
    rows, texts = packed_rows(config.data, 3), [{"input_ids": [1]}, {"input_ids": [2]}]
    assert [row["input_ids"] for row in shared_rows(texts, 2)] == [[1], [1], [2], [2]]
    many = shared_rows(rows, 2)
    assert len(many) == 6
    for index in range(6):
        assert list(many[index]["input_ids"]) == list(rows[index // 2]["input_ids"])
    order = RowOrder(config.data, 0, 3)
    assert list(many[4]["shift_labels"]) == order.batch(2, 1).labels[0].tolist()
    with pytest.raises(ValueError, match="must be 1 or more, found 0"):
        shared_rows(texts, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size must be 1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers must be 0"),
    ],
)
def test_arguments_that_would_train_otherwise_are_refused(made, tmp_path, changes, said):
    config, _, _ = made
    trainer = made_trainer(replace(config, out=str(tmp_path)), 1, "trainer", **changes)
    with pytest.raises(ValueError, match=said):
        trainer.train()


def test_processes_that_would_not_share_rows_are_refused(made, tmp_path):
    """What only the callback sees: order, attention, a head with an adapter, the number of processes."""
    config, _, _ = made
    trainer = made_trainer(replace(config, out=str(tmp_path)), 1, "trainer", train_sampling_strategy="random")
    callback = ContextParallelCallback(ContextParallelCollator(trainer.model.config, 2))
    asked = {"model": trainer.model, "train_dataloader": trainer.get_train_dataloader()}

    def refused(said, **changes):
        world = SimpleNamespace(**({"world_size": 2} | trainer_arguments() | changes))
        with pytest.raises(ValueError, match=said):
            callback.on_train_begin(world, trainer.state, trainer.control, **asked)

    refused("must be 'sequential', found 'random'", train_sampling_strategy="random")
    refused("context_parallel_size is 2, and the run has 3 processes", world_size=3)
    refused(r"shared_rows\(rows, context_parallel_size=2\)")
    trainer.model.lm_head.base_layer = trainer.model.lm_head.weight
    refused("The head has an adapter")
    trainer.model.config._attn_implementation = "sdpa"
    refused("attn_implementation='sdpa'")
    config = AutoConfig.from_pretrained(config.model)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' follows the length"):
        ContextParallelCollator(config)


def test_without_shifted_labels_the_model_is_what_it_was(make_tiny_model):
    model, ids = make_tiny_model(), torch.arange(30)[None]
    before = model(ids, labels=ids)
    tile_loss(model, 7)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
    shifted = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], 1)
    tiled = model(ids, shift_labels=shifted)
    torch.testing.assert_close(tiled.loss, before.loss)
    torch.testing.assert_close(model(ids, shift_labels=shifted, num_items_in_batch=58).loss, before.loss / 2)


def blocks():
    """The Python of the topic page, as it stands."""
    page = Path(ultralong.__file__).parent / "training" / "huggingface" / "README.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_pages_examples_run_as_they_stand(made, tmp_path, monkeypatch):
    folder = Path(made[0].model).parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long").symlink_to(folder / "model")
    (tmp_path / "rows").symlink_to(folder / "rows")
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    names: dict[str, object] = {}
    for block in blocks()[:2]:
        exec(block, names)
    assert [path.name for path in sorted((tmp_path / "trained").glob("checkpoint-*"))] == ["checkpoint-2"]


def policy_gradients(rank, world, model, ids, advantages, out):
    names: dict[str, object] = {}
    exec(blocks()[2], names)
    model.zero_grad()
    names["policy_loss"](model, ids, advantages, torch.distributed.group.WORLD if world > 1 else None).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for grad in found.values() if world > 1 else ():
        torch.distributed.all_reduce(grad)
    torch.save(found, out) if rank == 0 else None
    return found


def test_a_policy_gradient_over_two_processes_is_that_of_transformers(tiny_model, tmp_path):
    """Attention and loss alone, as a framework for reinforcement learning takes them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 400, (1, 45), generator=generator)
    advantages = torch.randn(1, 45, generator=generator) * (torch.arange(45) >= 20)
    tiny_model.set_attn_implementation("eager")
    logprobs = tiny_model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    (-(logprobs * advantages[:, 1:]).sum() / 25).backward()
    expected = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.set_attn_implementation("ultralong")
    alone = policy_gradients(0, 1, tiny_model, ids, advantages, tmp_path / "alone.pt")
    run_ranks(policy_gradients, 2, tiny_model, ids, advantages, tmp_path / "both.pt")
    for name, grad in expected.items():
        for found in (alone[name], torch.load(tmp_path / "both.pt")[name]):
            assert (found - grad).norm() <= 1e-4 * grad.norm(), name
