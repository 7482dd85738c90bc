"""Dynamic context parallelism: rows of different lengths in one step, each shared by as many processes as it needs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import train_over
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ultralong.attention.choose import RowSpec, choose_layout
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import pack
from ultralong.data.rows.separators import PackSettings
from ultralong.data.rows.step_packs import step_packs
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.utils.files import read_jsonl

WORDS = "the keeper of the light wrote in his log that no ship had passed and the tide came in at dawn".split()
LENGTHS = {"chat": 96, "masked": 128, "long": 448}
ROWS, STEPS = 7, 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A tiny model and rows of three lengths: conversations, masked documents, and long rows that see all of theirs."""
    folder = tmp_path_factory.mktemp("dynamic")
    model = make_tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(30 + 67 * (i % 4))) for i in range(24)]
    documents = [Document(str(i), text, license="CC0-1.0") for i, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "tokens", quiet=True)
    for name, masked in (("masked", True), ("long", False)):
        how = PackSettings(length=LENGTHS[name], mask_documents=masked, tail="pad")
        pack(store, tiny_tokenizer, folder / name, how, quiet=True)
    talks = [
        [{"role": "user", "content": text[:50]}, {"role": "assistant", "content": text[50 : 70 + 9 * (i % 5)]}]
        for i, text in enumerate(texts)
    ]
    pack_chat(talks, tiny_tokenizer, folder / "chat", ChatSettings(length=LENGTHS["chat"]), quiet=True)
    return folder


@pytest.fixture
def config(mixture, tmp_path):
    return TrainConfig(
        model=str(mixture / "model"), out=str(tmp_path / "run"), steps=STEPS, global_batch_size=ROWS, dtype="float32",
        data=tuple(DataSource(str(mixture / name), weight) for name, weight in zip(LENGTHS, (3, 2, 1), strict=True)),
        optimizer=OptimizerConfig(lr=1e-3), parallel=ParallelConfig(dynamic_context_parallel=True),
    )  # fmt: skip


def curve(config, key="loss"):
    return [record[key] for record in read_jsonl(f"{config.out}/log.jsonl")]


def row_by_row(config):
    """The first step by transformers alone: every document of every row by itself, one loss over all targets."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64, attn_implementation="eager")
    order = RowOrder.of_run(config)
    losses, targets, lengths = [], 0, set()
    for place in map(order.place, range(ROWS)):
        rows = order.folders[place.source]
        row = rows[place.row]
        lengths.add(rows.length)
        edges = row.boundaries if rows.mask_documents else (0, rows.length)
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            ids, labels, positions = (
                torch.from_numpy(getattr(row, name)[start:stop])[None]
                for name in ("input_ids", "labels", "position_ids")
            )
            logits = model(input_ids=ids, position_ids=positions).logits
            losses.append(cross_entropy(logits[0], labels[0], reduction="sum"))
            targets += int((labels != -100).sum())
    loss = sum(losses) / targets
    loss.backward()
    norm = sum(float(parameter.grad.square().sum()) for parameter in model.parameters()) ** 0.5
    return float(loss), norm, targets, lengths


def test_a_step_of_mixed_rows_is_what_each_row_gives_by_itself(config):
    loss, norm, targets, lengths = row_by_row(config)
    assert lengths == set(LENGTHS.values())
    train(config, quiet=True)
    assert curve(config, "targets")[0] == targets
    assert curve(config)[0] == pytest.approx(loss, rel=1e-5)
    assert curve(config, "grad_norm")[0] == pytest.approx(norm, rel=1e-5)
    for processes, parallel in ((2, {}), (4, {}), (4, {"scheme": "ring"}), (4, {"context_parallel_size": 2})):
        print(processes, parallel)
        many = replace(
            config,
            out=f"{config.out}-{processes}-{'-'.join(map(str, parallel.values()))}",
            parallel=replace(
                config.parallel, **({"context_parallel_size": processes, "fsdp_shard_degree": processes} | parallel)
            ),
        )
        train_over(many, processes)
        print(read_jsonl(f"{many.out}/log.jsonl"))
        assert curve(many, "grad_norm") == pytest.approx(curve(config, "grad_norm"), rel=2e-4)
        assert curve(many) == pytest.approx(curve(config), rel=2e-5)
