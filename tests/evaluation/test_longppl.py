"""LongPPL equals the plain formula, token by token, however the text is read; intervals, refusals, the command."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ultralong import attention
from ultralong.ablation import load_study
from ultralong.ablation.outcomes import read_outcomes
from ultralong.ablation.resolve import check
from ultralong.cli import main
from ultralong.data.read.documents import Document
from ultralong.data.rows.packed_rows import IGNORE, PackedRows
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.rows.short_contexts import short_contexts
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.evaluation.measures.key_tokens import KeyRule, Text, find_key_tokens, key_tokens, long_texts
from ultralong.evaluation.measures.longppl import longppl, longppl_result, measure_longppl
from ultralong.utils.files import read_json
from ultralong.utils.local_ranks import run_ranks

RULE = KeyRule(short_context=8, stride=5, alpha=0.02, beta=-7.0)  # of a random model: it guesses among 512 tokens


@pytest.fixture(scope="module")
def reader(make_tiny_model):
    model = make_tiny_model(2, num_hidden_layers=1, attn_implementation=attention.NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares what lies far back
    return model


def text(tokens=48, seed=0):
    ids = np.random.default_rng(seed).integers(2, 400, tokens + 1)
    labels = ids[1:].copy()
    labels[20] = IGNORE
    return Text(seed, ids[:-1], labels)


@torch.no_grad()
def plain(model, one, rule):
    """Each token by itself, by the model's own forward pass: losses with the whole text and with a short context."""
    ids = torch.from_numpy(one.input_ids)
    found = np.full((2, len(ids)), np.nan)
    for place, label in enumerate(one.labels):
        if label == IGNORE:
            continue
        block = (place + 1 - rule.short_context) // rule.stride
        start = block * rule.stride
        for which, first in enumerate((0, start)):
            if which == 0 or (place + 1 >= rule.short_context and block > 0):
                logits = model(ids[None, first : place + 1]).logits[0, -1].double()
                found[which, place] = -float(logits.log_softmax(0)[label])
    return found


@pytest.mark.parametrize("chunk", [None, 7])
def test_key_tokens_are_those_of_the_formula(reader, chunk):
    texts = [text(), text(33, 1)]
    keys, losses = find_key_tokens(reader, texts, RULE, chunk=chunk, quiet=True)
    assert 4 < sum(key.sum() for key in keys) < 40
    for one, key, loss in zip(texts, keys, losses, strict=True):
        long, short = plain(reader, one, RULE)
        known = ~np.isnan(long)
        np.testing.assert_allclose(loss[known], long[known], rtol=2e-5)
        assert key.tolist() == [a < 7.0 and b - a > 0.02 for a, b in zip(long, short, strict=True)]


def shared(rank, world, model, texts):
    return find_key_tokens(model, texts, RULE, group=dist.group.WORLD, quiet=True)


def test_two_ranks_find_the_same(reader):
    texts = [text(), text(33, 1)]
    keys, losses = find_key_tokens(reader, texts, RULE, quiet=True)
    for found, read in run_ranks(shared, 2, reader, texts):
        for mine, theirs, loss, other in zip(keys, found, losses, read, strict=True):
            assert mine.tolist() == theirs.tolist()
            np.testing.assert_allclose(loss, other, rtol=2e-5, atol=1e-6)


def test_both_thresholds_count_and_nothing_without_a_target():
    long, short = np.array([1.0, 1.0, 2.5, 0.5, 0.1]), np.array([3.5, 2.9, 6.0, np.nan, 9.0])
    labels = np.array([5, 5, 5, 5, IGNORE])
    assert key_tokens(long, short, labels, KeyRule()).tolist() == [True, False, False, False, False]


def test_stretches_cover_each_place_once_and_stay_in_their_document():
    labels = np.ones((2, 61), dtype=np.int64)
    labels[1, 30:] = IGNORE
    found = short_contexts(labels, [0, 29, 61], 8, 5)
    assert all(a.start // 5 * 5 == a.start or a.start >= 29 for a in found)
    counted = np.zeros((2, 61), dtype=int)
    for one in found:
        assert (one.start < 29) == (one.end <= 29)
        assert one.first + 1 - one.start >= 8
        assert one.length <= 12
        counted[one.row, one.first : one.end] += 1
    # The first block of a document (8 + 5 - 1 places) reads all of it either way.
    assert counted.tolist() == [([0] * 12 + [1] * 17) + [0] * 12 + [1] * 20, [0] * 12 + [1] * 17 + [0] * 32]
    with pytest.raises(ValueError, match="1 token or more"):
        short_contexts(labels, None, 8, 0)


def test_the_number_is_the_mean_over_key_tokens_with_an_interval_over_documents():
    texts = [Text(document, np.arange(300), np.arange(300)) for document in (7, 7, 9)]
    losses = [np.linspace(0.1, 2, 300) + number for number in range(3)]
    keys = [np.isin(np.arange(300), places) for places in ([100, 280], [], [50])]
    result = longppl_result(texts, keys, losses, RULE, evaluator="e")
    chosen = [losses[0][100], losses[0][280], losses[2][50]]
    assert result.value == pytest.approx(math.exp(np.mean(chosen)))
    assert (result.n, result.details["documents"], result.details["tokens"]) == (3, 2, 900)
    assert result.details["perplexity"] == pytest.approx(math.exp(np.mean(losses)))
    assert result.details["each"] == [[7, pytest.approx(sum(chosen[:2])), 2], [9, pytest.approx(chosen[2]), 1]]
    # Either document alone is the most extreme draw.
    assert result.low == pytest.approx(math.exp(np.mean(chosen[:2])))
    assert result.high == pytest.approx(math.exp(chosen[2]))
    assert [(part.start, part.end, part.n) for part in result.by_position] == [(0, 256, 2), (256, 300, 1)]
    with pytest.raises(ValueError, match="finds no key token among 900"):
        longppl_result(texts, [np.zeros(300, bool)] * 3, losses, RULE, evaluator="e")


@pytest.fixture(scope="module")
def packed(tmp_path_factory, reader, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("packed")
    draw = np.random.default_rng(0)
    words = [" ".join(draw.choice(["sea", "wall", "boat", "night", "stone"], 30)) for _ in range(6)]
    documents = [Document(str(index), words[index], "made here", "CC0") for index in range(6)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "tokens", quiet=True)
    pack(store, tiny_tokenizer, folder / "rows", PackSettings(length=128), quiet=True)
    reader.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    return folder


def test_texts_are_documents_or_rows(packed, reader):
    rows = PackedRows(packed / "rows")
    for one in long_texts(rows, RULE):
        assert len(one.labels) >= RULE.shortest
        assert one.labels[:-1].tolist() == one.input_ids[1:].tolist()
        assert one.labels[-1] == IGNORE
    assert [len(one.labels) for one in long_texts(rows, RULE, "row", 2)] == [128, 128]
    with pytest.raises(ValueError, match=r"No document in .* has 5,120 tokens"):
        long_texts(rows, KeyRule())
    with pytest.raises(ValueError, match="'document' or 'row'"):
        long_texts(rows, RULE, "page")
    mild = KeyRule(8, 5, -1.0, -9.0)
    assert longppl(reader, rows, mild, quiet=True).n > longppl(reader, rows, RULE, quiet=True).n


def test_the_command_says_it_and_a_run_reports_it(packed, make_tiny_model, tiny_tokenizer, capsys):
    make_tiny_model(5, num_hidden_layers=1).save_pretrained(packed / "other")
    tiny_tokenizer.save_pretrained(packed / "other")
    rule = ["--short-context", "8", "--short-stride", "5", "--key-alpha", "0.02", "--key-beta=-7"]
    words = ["eval", "longppl", str(packed / "other"), "--rows", str(packed / "rows"), "--evaluator"]
    main([*words, str(packed / "model"), *rule, "--device", "cpu", "--json", str(packed / "found.json")])
    said = capsys.readouterr().out
    found = read_json(packed / "found.json")["result"]
    assert f"LongPPL {found['value']:.3f}" in said
    assert f"key tokens chosen by {packed / 'model'}" in said
    two = measure_longppl(
        packed / "other",
        packed / "rows",
        evaluator=packed / "model",
        rule=RULE,
        gpus=2,
        device="cpu",
    )["result"]
    assert two["value"] == pytest.approx(found["value"], rel=1e-5)
    assert two["n"] == found["n"]
    run = ["eval", "run", "longppl", str(packed / "other"), "--rows", str(packed / "rows"), "--evaluator"]
    main([*run, str(packed / "model"), *rule, "--device", "cpu", "--out", str(packed / "run")])
    assert f"LongPPL {found['value']:.3f}" in capsys.readouterr().out
    assert read_json(packed / "run" / "longppl.json") == [found]
    assert "LongPPL" in (packed / "run" / "report.html").read_text()
    (outcome,) = read_outcomes(packed / "run", 64)
    assert (outcome.name, outcome.unit, len(outcome.samples)) == ("LongPPL", "nats", found["details"]["documents"])
    each = found["details"]["each"]
    assert outcome.values == tuple(nats / tokens for _, nats, tokens in each)
    with pytest.raises(SystemExit):  # what is there was measured by other thresholds
        main([*run, str(packed / "model"), "--device", "cpu", "--out", str(packed / "run")])
    assert "holds a run with short_context 8" in capsys.readouterr().err


def test_what_cannot_be_is_named(packed, capsys):
    with pytest.raises(ValueError, match="short_context and stride are tokens"):
        KeyRule(stride=0)
    with pytest.raises(ValueError, match="alpha and beta"):
        KeyRule(alpha=math.nan)
    with pytest.raises(SystemExit):
        main(["eval", "longppl", str(packed / "model"), "--rows", str(packed / "rows"), "--device", "cpu"])
    assert "has 5,120 tokens (short context and stride)" in capsys.readouterr().err
    study = load_study("miniature", ["base.evaluation.tasks=[longppl]"])
    with pytest.raises(ValueError, match=r"name base.evaluation\.evaluator"):
        check(study)
