"""Prompts answered together say what each says alone."""

import random

import pytest
import torch
from test_generate import plain_tokens, tokens
from test_sharded_generation import make_model
from transformers import MistralConfig, MistralForCausalLM

from ultralong.inference.batched import BatchedRunner, batch_that_fits


def make_prompts(lengths, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(2, 512) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("packed", [1, 100, 10000])
def test_each_row_says_what_it_says_alone(kind, packed):
    model, lengths = make_model(kind), (5, 77, 1, 130, 64, 63, 20, 65)
    prompts, budgets = make_prompts(lengths), (10, 3, 20, 1, 12, 8, 20, 15)
    alone = [
        plain_tokens(model, torch.tensor([prompt]), budget, stop=set())[0]
        for prompt, budget in zip(prompts, budgets, strict=True)
    ]
    assert tokens(BatchedRunner(model, packed), prompts, budgets, stop=set()) == alone
    assert tokens(BatchedRunner(model), prompts[3:4], [1], stop=set()) == alone[3:4]


def test_each_row_ends_by_itself():
    model, prompts = make_model("llama"), make_prompts((30, 9, 44, 71))
    free = tokens(BatchedRunner(model), prompts, 16, stop=set())
    stop = {free[0][3], free[1][0], free[2][9]}
    for before, after in zip(free, tokens(BatchedRunner(model), prompts, 16, stop=stop), strict=True):
        cut = next((place for place, token in enumerate(before) if token in stop), len(before))
        assert after == before[:cut]


def test_how_many_at_once():
    model = make_model("llama")
    assert batch_that_fits(model, 100, 7) == 7
    assert batch_that_fits(model, 100, None) == 1, "on a CPU one at a time, unless asked for more"
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        batch_that_fits(model, 100, 0)


def test_what_cannot_be_is_refused():
    model = make_model("llama")
    for prompts, budgets in (([], []), ([[1], []], [1, 1]), ([[1]], [0]), ([[1]], [1, 1])):
        with pytest.raises(ValueError, match="at least one prompt"):
            tokens(BatchedRunner(model), prompts, budgets)
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
        )
    )
    with pytest.raises(ValueError, match="sliding window of 8"):
        BatchedRunner(windowed)
