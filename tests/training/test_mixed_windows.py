"""Mixed windows: long rows with the long table and short masked documents with the old one, in the same steps."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.support.tiny_run import LENGTH, make_run
from ultralong.data.read.documents import Document
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, ParallelConfig
from ultralong.training.loop import train
from ultralong.utils.files import read_jsonl

OLD = LENGTH // 2


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """Rows of the new window that are one text, rows of documents within the old one, a model with a table for each."""
    folder = tmp_path_factory.mktemp("mixed")
    model = make_tiny_model(num_hidden_layers=1, max_position_embeddings=OLD, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares where keys are
    config = make_run(folder, model, tiny_tokenizer, steps=1, global_batch_size=4)
    path = folder / "model" / "config.json"
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": OLD,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + index for index in range(8)], "attention_factor": 1.0,
    }  # fmt: skip
    settings = json.loads(path.read_text()) | {"max_position_embeddings": LENGTH, "rope_parameters": rope}
    path.write_text(json.dumps(settings | {"original_max_position_embeddings": OLD}))
    texts = [f"Entry {number}: the tide came in at {number}. " for number in range(40)]
    documents = [Document(str(number), text, "test", "CC0-1.0") for number, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "short", quiet=True)
    packing = PackSettings(length=LENGTH, mask_documents=True, positions="document")
    pack(store, tiny_tokenizer, folder / "masked", packing, quiet=True)
    data = tuple(DataSource(str(folder / name), 0.5) for name in ("rows", "masked"))
    return replace(
        config, model=str(folder / "model"), data=data, parallel=ParallelConfig(dynamic_context_parallel=True)
    )


def test_each_text_is_read_with_the_table_of_its_length(made, tmp_path):
    train(replace(made, out=str(tmp_path / "run")), quiet=True)
    (record,) = read_jsonl(tmp_path / "run" / "log.jsonl")
    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32, attn_implementation="eager")
    order, total, count, lengths = RowOrder.of_run(made), 0.0, 0, []
    for index in range(4):
        place = order.place(index)
        rows: PackedRows = order.folders[place.source]
        row, edges = rows[place.row], order.documents(place)
        for start, end in pairwise(edges):
            # Alone, at positions from 0: transformers itself takes the table that goes with the length.
            with torch.no_grad():
                logits = model(torch.from_numpy(row.input_ids[start:end])[None]).logits[0].double()
            labels = torch.from_numpy(row.labels[start:end])
            total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
            lengths.append(end - start)
    assert min(lengths) < OLD < max(lengths), "the draw holds one kind of rows alone"
    assert record["loss"] == pytest.approx(total / count, abs=3e-6)
    assert math.isfinite(record["grad_norm"])
