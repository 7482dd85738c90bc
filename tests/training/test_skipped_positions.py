"""Skipped positions (PoSE): exact against transformers' eager attention in every scheme, resumed, refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import train_over
from transformers import AutoModelForCausalLM

from tests.support.tiny_run import LENGTH, make_run
from ultralong.training.batches import RowOrder, skipped_positions
from ultralong.training.config import ParallelConfig
from ultralong.training.loop import train
from ultralong.training.preflight import check_start
from ultralong.utils.files import read_jsonl

TO = 256


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A run of one layer and two rows a step, and beside it a model with dynamic RoPE, which follows the length."""
    folder = tmp_path_factory.mktemp("skips")
    model = make_tiny_model(num_hidden_layers=2, max_position_embeddings=TO, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares where keys are
    config = make_run(folder, model, tiny_tokenizer, steps=2, skip_positions_to=TO)
    shutil.copytree(folder / "model", folder / "dynamic")
    path = folder / "dynamic" / "config.json"
    settings = json.loads(path.read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(settings | {"max_position_embeddings": 64, "rope_parameters": rope}))
    return replace(config, model=str(folder / "model"), data=(replace(config.data[0], rows=str(folder / "rows")),))


def reference(config, positions):
    """The first step's loss by transformers alone, a row at a time, with an explicit causal mask."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, attn_implementation="eager")
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    order = RowOrder(config.data, config.seed, 4)
    total, targets = 0.0, 0
    for index in range(2):
        place = order.place(index)
        row = order.folders[place.source][place.row]
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(row.input_ids)[None],
                position_ids=torch.from_numpy(positions(index))[None],
                attention_mask=mask,
            ).logits[0]
        labels = torch.from_numpy(row.labels)
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        targets += int((labels != -100).sum())
    return total / targets


def skipped(index):
    return skipped_positions(LENGTH, TO, 0, index)


@pytest.mark.parametrize("name", ["model", "dynamic"])
def test_the_loss_is_that_of_a_text_at_those_positions(made, tmp_path, name):
    config = replace(made, model=str(Path(made.model).with_name(name)), micro_batch_size=2, steps=1)
    train(replace(config, out=str(tmp_path / "run")), quiet=True)
    (record,) = read_jsonl(tmp_path / "run" / "log.jsonl")
    expected = reference(config, skipped)
    assert record["loss"] == pytest.approx(expected, abs=2e-6)
    assert abs(expected - reference(config, lambda index: np.arange(LENGTH))) > 1e-3, "positions change nothing here"
    assert f"positions skipped up to {TO}" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["ulysses", "ring", pytest.param("gathered", marks=pytest.mark.soak)])
def test_every_scheme_computes_the_same(made, tmp_path, scheme):
    parallel = ParallelConfig(context_parallel_size=2, scheme=scheme)
    config = replace(made, out=str(tmp_path / "run"), parallel=parallel, steps=1)
    train_over(config, 2)
    assert read_jsonl(tmp_path / "run" / "log.jsonl")[0]["loss"] == pytest.approx(reference(config, skipped), abs=2e-6)


def test_a_resumed_run_draws_the_same(made, tmp_path):
    whole = replace(made, out=str(tmp_path / "whole"), save_every=1, steps=3)
    train(whole, quiet=True)
    losses = [record["loss"] for record in read_jsonl(tmp_path / "whole" / "log.jsonl")]
    cut = replace(whole, out=str(tmp_path / "cut"))
    shutil.copytree(whole.out, cut.out, ignore=shutil.ignore_patterns("model", "result.json", "step-0000003"))
    text = (tmp_path / "cut" / "config.yaml").read_text().replace(whole.out, cut.out)
    (tmp_path / "cut" / "config.yaml").write_text(text)
    train(cut, resume=True, quiet=True)
    assert [record["loss"] for record in read_jsonl(tmp_path / "cut" / "log.jsonl")] == losses
    assert (tmp_path / "cut" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(ValueError, match="skip_positions_to"):
        check_start(replace(cut, skip_positions_to=TO // 2), 1, resume=True)


def test_every_cut_and_skip_comes_up():
    drawn = [skipped_positions(5, 9, 3, index) for index in range(600)]
    assert {tuple(positions) for positions in drawn} == {
        (*range(cut), *range(cut + skip, 5 + skip)) for cut in (1, 2, 3) for skip in range(5)
    }
    again = [skipped_positions(5, 9, 3, index) for index in range(600)]
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, [skipped_positions(5, 9, 4, index) for index in range(600)])
    assert np.array_equal(skipped_positions(5, 5, 0, 0), np.arange(5)), "no room, no skip"


def edited(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "to", "message"),
    [
        ("rows/manifest.json", {"mask_documents": True}, TO, "documents in .* do not see each other"),
        ("rows/manifest.json", {"positions": "document"}, TO, "documents in .* do not see each other"),
        (
            "model/config.json",
            {},
            LENGTH - 1,
            f"skip_positions_to is {LENGTH - 1}, the rows in .* {LENGTH} tokens",
        ),
        ("model/config.json", {}, TO + 1, f"skip_positions_to is {TO + 1}, the model's window is {TO}. Extend it"),
        (
            "model/config.json",
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
            TO,
            "needs full attention in every layer, the model has sliding windows",
        ),
        (
            "model/config.json",
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
            TO,
            "the model has sliding_attention",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(made, tmp_path, file, changes, to, message):
    for name in ("model", "rows"):
        shutil.copytree(Path(made.model).with_name(name), tmp_path / name)
    edited(tmp_path, file, **changes)
    data = (replace(made.data[0], rows=str(tmp_path / "rows")),)
    config = replace(made, model=str(tmp_path / "model"), data=data, out=str(tmp_path / "run"), skip_positions_to=to)
    with pytest.raises(ValueError, match=message):
        check_start(config, 1)


def test_compiled_attention_is_refused(made):
    with pytest.raises(ValueError, match="compile and skip_positions_to don't go together"):
        replace(made, compile=True)
