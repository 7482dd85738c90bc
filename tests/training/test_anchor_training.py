"""Training with an anchor: loss and gradients against transformers' eager attention with the mask written out."""

import math
from dataclasses import replace

import pytest
import torch
from forked import train_over
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.support.tiny_run import LENGTH, make_run
from ultralong.ablation import load_study
from ultralong.ablation.resolve import check
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, MemoryConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.preflight import check_start
from ultralong.utils.files import read_json, read_jsonl, write_json

BOS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("anchor")
    model = make_tiny_model(max_position_embeddings=LENGTH, vocab_size=len(tiny_tokenizer), bos_token_id=BOS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares which keys there are
    config = make_run(folder, model, tiny_tokenizer, steps=1, anchor=True)
    settings = PackSettings(length=LENGTH, mask_documents=True)
    texts = [f"Entry {number} of the log: the tide came in at {number}. " for number in range(40)]
    documents = [Document(str(number), text, "test", "CC0-1.0") for number, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "short", quiet=True)
    pack(store, tiny_tokenizer, folder / "masked", settings, quiet=True)
    return replace(config, model=str(folder / "model"), data=(DataSource(str(folder / "masked")),))


@pytest.fixture(scope="module")
def expected(made):
    """Loss and gradient norm of the first step, with and without the anchor's column of the mask."""
    found = []
    for shared in (True, False):
        model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32, attn_implementation="eager")
        order, total, count = RowOrder(made.data, made.seed, 2), torch.zeros((), dtype=torch.float64), 0
        for index in range(2):
            place = order.place(index)
            row = order.folders[place.source][place.row]
            documents = torch.bucketize(torch.arange(LENGTH), torch.from_numpy(row.boundaries[1:]), right=True)
            seen = (documents[:, None] == documents[None]).tril()
            seen[:, 0] |= shared
            ids = torch.from_numpy(row.input_ids)[None].clone()
            ids[0, 0] = BOS
            mask = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            positions = torch.from_numpy(row.position_ids)[None]
            logits = model(ids, attention_mask=mask, position_ids=positions).logits[0].double()
            labels = torch.from_numpy(row.labels)
            total = total + cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        (total / count).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        found.append((float(total.detach() / count), norm))
    return found


SHARED = {
    "one process, rows end to end": (1, {"micro_batch_size": 2}),
    "tiles, attention kept": (
        1,
        {"memory": MemoryConfig(activation_checkpointing=True, layer_tile=24, attention_outputs_on_gpu=1)},
    ),
    "two processes, ulysses": (2, {"parallel": ParallelConfig(2, scheme="ulysses"), "micro_batch_size": 2}),
    "two processes, ring, recomputed": (
        2,
        {"parallel": ParallelConfig(2, scheme="ring"), "memory": MemoryConfig(activation_checkpointing=True)},
    ),
    "packs": (2, {"parallel": ParallelConfig(2, scheme="gathered", dynamic_context_parallel=True)}),
}
LONG = ("two processes, ulysses", "two processes, ring, recomputed")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.soak] * (case in LONG)) for case in SHARED])
def test_a_step_is_that_of_the_mask(made, expected, tmp_path, case):
    processes, changes = SHARED[case]
    config = replace(made, out=str(tmp_path / "run"), **changes)
    if processes == 1:
        train(config, quiet=True)
    else:
        train_over(config, processes)
    (record,) = read_jsonl(tmp_path / "run" / "log.jsonl")
    (loss, norm), (without, _) = expected
    assert record["loss"] == pytest.approx(loss, abs=3e-6)
    assert record["grad_norm"] == pytest.approx(norm, rel=2e-5)
    assert abs(loss - without) > 1e-3, "the anchor changes nothing here"
    assert "shared by its documents (anchor)" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_what_has_no_anchor_is_named(made, tmp_path, make_tiny_model, tiny_tokenizer):
    rows = replace(made, data=(DataSource(made.data[0].rows.replace("masked", "rows")),))
    with pytest.raises(ValueError, match="anchor shares a token among documents that do not see each other"):
        check_start(rows, 1)
    make_tiny_model(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    settings = read_json(tmp_path / "model" / "config.json")
    for changes, message in (
        ({"bos_token_id": None}, "anchor needs a BOS token"),
        ({"sliding_window": 9}, "anchor needs full attention in every layer, the model has sliding windows"),
    ):
        write_json(tmp_path / "model" / "config.json", settings | changes)
        with pytest.raises(ValueError, match=message):
            check_start(replace(made, model=str(tmp_path / "model")), 1)
    for changes, message in (
        ({"long_ce": LongCEConfig(5.0)}, "anchor and long_ce don't go together"),
        ({"skip_positions_to": 128}, "anchor and skip_positions_to"),
        ({"compile": True}, "compile and anchor"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(made, **changes)
    with pytest.raises(ValueError, match=r"training\.anchor needs masked documents"):
        check(load_study("miniature", ["base.training.anchor=true"]))
