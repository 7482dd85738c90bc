"""Perplexity by position equals the plain formula, however it is tiled, chunked or binned."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM

from ultralong.evaluation.measures import perplexity
from ultralong.evaluation.measures.perplexity import perplexity_by_position, perplexity_by_positions, token_losses


def rows(count=5, tokens=65, seed=0):
    return np.random.default_rng(seed).integers(2, 512, size=(count, tokens))


def plain_losses(model, tokens):
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1])).logits
    return cross_entropy(logits.transpose(1, 2), torch.from_numpy(tokens[:, 1:]), reduction="none").double().numpy()


@pytest.mark.parametrize("chunk", [None, 10, 64])
def test_token_losses_equal_the_models_own(tiny_model, monkeypatch, chunk):
    monkeypatch.setattr(perplexity, "TILE_LOGITS", 512 * 7)  # tiles of 7 tokens: the last one is short
    model, tokens = tiny_model.double(), rows()
    losses = token_losses(model, torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:]), chunk=chunk)
    np.testing.assert_allclose(losses.numpy(), plain_losses(model, tokens), rtol=1e-5)


def test_logits_exist_for_one_tile_only(tiny_model, monkeypatch):
    monkeypatch.setattr(perplexity, "TILE_LOGITS", 512 * 7)
    seen = []
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2]))
    tokens = torch.from_numpy(rows())
    token_losses(tiny_model, tokens[:, :-1], tokens[:, 1:])
    assert max(seen) == 7


def test_bins_hold_the_means_of_their_positions(tiny_model):
    tokens = rows()
    expected = plain_losses(tiny_model, tokens)
    bins = perplexity_by_position(tiny_model, list(tokens), [0, 1, 16, 64], quiet=True)
    assert [(item["start"], item["end"], item["n"], item["rows"]) for item in bins] == [
        (0, 1, 5, 5),
        (1, 16, 75, 5),
        (16, 64, 240, 5),
    ]
    for item in bins:
        assert item["nll"] == pytest.approx(expected[:, item["start"] : item["end"]].mean(), rel=1e-5)
        assert item["perplexity"] == pytest.approx(math.exp(item["nll"]))
        assert item["low"] <= item["perplexity"] <= item["high"]


def test_rows_of_different_lengths_and_bins_beyond_them(tiny_model):
    tokens = [row[:length] for row, length in zip(rows(3), (65, 33, 17), strict=True)]
    bins = perplexity_by_position(tiny_model, tokens, [0, 16, 32, 64, 128], quiet=True)
    assert [(item["end"], item["n"], item["rows"]) for item in bins] == [(16, 48, 3), (32, 32, 2), (64, 32, 1)]
    assert bins[2]["low"] is None
    assert bins[2]["high"] is None


def test_packed_rows_keep_their_labels_and_count_by_document(tiny_model):
    tokens = rows(2)
    labels = tokens[:, 1:].copy()
    labels[:, 9] = -100  # the end of the first document
    packed = [
        SimpleNamespace(input_ids=row[:-1], labels=label, boundaries=np.array([0, 10, 64]))
        for row, label in zip(tokens, labels, strict=True)
    ]
    expected = plain_losses(tiny_model, tokens)
    first, rest = perplexity_by_position(tiny_model, packed, [0, 5, 64], by="document", quiet=True)
    # Five tokens of each of two documents in each of two rows.
    assert first["n"] == 20
    assert first["nll"] == pytest.approx(np.concatenate([expected[:, :5], expected[:, 10:15]], 1).mean(), rel=1e-5)
    assert rest["n"] == 2 * 63 - 20


def test_two_ways_of_counting_read_each_row_once(tiny_model):
    packed = [SimpleNamespace(input_ids=row[:-1], labels=row[1:], boundaries=np.array([0, 10, 64])) for row in rows(2)]
    edges = [0, 5, 64]
    apart = {by: perplexity_by_position(tiny_model, packed, edges, by=by, quiet=True) for by in ("row", "document")}
    assert apart["row"] != apart["document"]
    passes = []
    tiny_model.model.register_forward_hook(lambda module, inputs, output: passes.append(output[0].shape[1]))
    assert perplexity_by_positions(tiny_model, packed, edges, quiet=True) == apart
    assert passes.count(64) == 2


def test_interval_repeats_with_its_seed(tiny_model):
    first, second = (perplexity_by_position(tiny_model, list(rows()), [0, 64], seed=3, quiet=True) for _ in range(2))
    assert first == second


def test_models_that_cap_their_logits_are_refused():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=0.01,
        )
    ).eval()
    with pytest.raises(ValueError, match="changes its logits"):
        token_losses(model, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2, 3]], [0]), "edges must rise"),
        (([[1, 2, 3]], [0, 4, 4]), "edges must rise"),
        (([], [0, 4]), "no rows"),
        (([[1]], [0, 4]), "at least two"),
    ],
)
def test_bad_input_is_named(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity_by_position(tiny_model, *arguments, quiet=True)
    with pytest.raises(ValueError, match="'row' or 'document'"):
        perplexity_by_position(tiny_model, [[1, 2, 3]], [0, 4], by="page", quiet=True)
