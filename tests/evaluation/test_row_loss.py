"""The loss on packed rows: the trainer's number, document by document, and what the command says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import make_run

from ultralong import attention
from ultralong.cli import main
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.rows.packed_rows import IGNORE, PackedRows
from ultralong.evaluation.measures.row_loss import RowLoss, loss_change, measure_loss, open_for_loss, row_loss
from ultralong.training.config import DataSource, OptimizerConfig
from ultralong.training.loop import train
from ultralong.utils.files import read_jsonl


def chat_rows(folder, tokenizer, count=24, length=128):
    talks = [
        [{"role": "user", "content": f"Is {n} a number?"}, {"role": "assistant", "content": "Yes. " * (1 + n % 3)}]
        for n in range(count)
    ]
    return pack_chat(talks, tokenizer, folder, ChatSettings(length=length), quiet=True)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_it_is_the_loss_that_a_training_step_logs(
    tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer, chat, micro_batch_size
):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, make_tiny_model(), tiny_tokenizer)
    if chat:
        chat_rows(tmp_path / "chat", tiny_tokenizer)
    rows = PackedRows(tmp_path / ("chat" if chat else "rows"))
    # One step over every row: its loss is that of the untouched model.
    train(
        replace(
            run,
            data=(DataSource(str(rows.folder)),),
            steps=1,
            global_batch_size=len(rows),
            optimizer=OptimizerConfig(lr=1e-9),
        ),
        quiet=True,
    )
    logged = read_jsonl(tmp_path / "run" / "log.jsonl")[0]
    found = row_loss(open_for_loss(tmp_path / "model"), rows, micro_batch_size=micro_batch_size, quiet=True)
    assert found.mean == pytest.approx(logged["loss"], abs=2e-6)
    assert found.counts.sum() == logged["targets"]
    assert found.summary()["loss_by_position"] == pytest.approx(logged["loss_by_position"], abs=1e-4)
    assert found.place_sums.sum() == pytest.approx(found.sums.sum())


def test_documents_add_up_and_masked_ones_do_not_see_each_other(tmp_path, make_tiny_model, tiny_tokenizer):
    model = make_tiny_model()
    model.set_attn_implementation(attention.NAME)
    rows = chat_rows(tmp_path / "rows", tiny_tokenizer)
    found = row_loss(model, rows, quiet=True)
    assert found.counts.sum() == rows.manifest["target_tokens"]
    assert (found.counts > 0).sum() == found.summary()["documents"] == rows.manifest["documents"] == 24
    # One conversation alone, without any other in its row, has the same loss.
    row = rows[0]
    start, end = row.boundaries[:2]
    ids = torch.from_numpy(row.input_ids[start:end])[None]
    logits = model(input_ids=ids).logits[0].float()
    labels = torch.from_numpy(row.labels[start:end])
    alone = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    assert found.sums[0] == pytest.approx(float(alone.detach()), rel=1e-5)
    assert RowLoss.from_dict(json.loads(json.dumps(found.to_dict()))).summary() == found.summary()


def test_a_change_is_paired(tmp_path):
    counts = np.array([3.0, 5.0, 0.0, 2.0])
    before = RowLoss(np.array([6.0, 5.0, 0.0, 4.0]), counts, np.zeros(1), np.zeros(1), 2)
    after = RowLoss(before.sums - 0.5 * counts, counts, np.zeros(1), np.zeros(1), 2)
    change = loss_change(before, after)
    assert (change["change"], change["low"], change["high"]) == pytest.approx((-0.5, -0.5, -0.5))
    assert change["better"] == 1.0
    with pytest.raises(ValueError, match="different rows"):
        loss_change(before, RowLoss(after.sums[:3], counts[:3], np.zeros(1), np.zeros(1), 2))


def test_the_command_says_it_and_compares(tmp_path, make_tiny_model, tiny_tokenizer, capsys):
    make_run(tmp_path, make_tiny_model(), tiny_tokenizer)
    make_tiny_model(seed=1).save_pretrained(tmp_path / "other")
    chat_rows(tmp_path / "chat", tiny_tokenizer)
    main(
        [
            "eval",
            "loss",
            str(tmp_path / "model"),
            str(tmp_path / "chat"),
            "--before",
            str(tmp_path / "other"),
            "--json",
            str(tmp_path / "out.json"),
        ]
    )
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    result, before = kept["result"], kept["before"]["result"]
    assert re.search(rf"model: {result['value']:.4f} \[.*\] nats per target, 192 targets of 24 documents", said)
    assert f"{kept['change']['change']:+.4f}" in said
    assert result["details"]["documents"] == 24
    assert before["value"] + kept["change"]["change"] == pytest.approx(result["value"])


def test_what_does_not_fit_is_refused(tmp_path, make_tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="cannot be opened"):
        open_for_loss(tmp_path / "nothing")
    make_run(tmp_path, make_tiny_model(), tiny_tokenizer)
    with pytest.raises(ValueError, match="no finished rows"):
        measure_loss(tmp_path / "model", tmp_path)
    with pytest.raises(ValueError, match="At least one row"):
        row_loss(open_for_loss(tmp_path / "model"), PackedRows(tmp_path / "rows"), most=0)
    make_tiny_model(vocab_size=300).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="the model has 300"):
        row_loss(open_for_loss(tmp_path / "small"), PackedRows(tmp_path / "rows"))
