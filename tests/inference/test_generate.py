"""Chunked prefill and greedy decoding equal transformers' own, token for token."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MistralConfig, MistralForCausalLM

from ultralong.inference.generate import PreallocatedLayer, end_tokens, generate_greedy, make_cache, prefill


def prompts(batch=2, tokens=40, seed=0):
    return torch.randint(2, 512, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [None, 1, 7, 39, 40, 64])
@pytest.mark.parametrize("keep", [1, 5, 40])
def test_chunked_prefill_equals_one_pass(tiny_model, chunk, keep):
    model, ids = tiny_model.double(), prompts()
    with torch.no_grad():
        expected = model(ids).logits[:, -keep:]
    logits = prefill(model, ids, keep=keep, chunk=chunk)
    assert logits.shape == (2, keep, 512)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_prefill_never_makes_logits_for_more_than_it_keeps(tiny_model):
    seen = []
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    prefill(tiny_model, prompts(), keep=3, chunk=8)
    assert max(seen) == 3


@pytest.mark.parametrize("chunk", [None, 8])
def test_greedy_equals_transformers(make_tiny_model, chunk):
    for seed in range(3):
        model, ids = make_tiny_model(seed).double(), prompts(3, 30, seed)
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        ours = generate_greedy(model, ids, 20, chunk=chunk, stop=set())
        assert ours == expected[:, 30:].tolist()


def test_greedy_stops_at_each_rows_own_end(make_tiny_model):
    model, ids = make_tiny_model().double(), prompts(3, 30)
    free = generate_greedy(model, ids, 12, stop=set())
    stop = {free[0][4], free[1][2]}
    stopped = generate_greedy(model, ids, 12, stop=stop)
    for before, after in zip(free, stopped, strict=True):
        cut = next((place for place, token in enumerate(before) if token in stop), len(before))
        assert after == before[:cut]
    assert len(stopped[0]) <= 4


def test_preallocated_cache_equals_a_growing_one_and_keeps_its_memory(tiny_model):
    config, growing = tiny_model.config, DynamicCache()
    fixed = make_cache(tiny_model, 24)
    assert isinstance(fixed.layers[0], PreallocatedLayer)
    draw = torch.Generator().manual_seed(0)
    pointers = set()
    for tokens in (5, 1, 18):
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, 2, 2, tokens, 16, generator=draw).unbind(0)
            ours, theirs = fixed.update(keys, values, layer), growing.update(keys, values, layer)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            pointers.add(ours[0].data_ptr())
    assert fixed.get_seq_length() == 24
    assert len(pointers) == config.num_hidden_layers
    with pytest.raises(ValueError, match="make it larger"):
        fixed.update(keys, values, 0)


def test_sliding_window_models_keep_their_own_cache():
    config = MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval().double()
    assert isinstance(make_cache(model, 64), DynamicCache)
    ids = prompts(1, 30)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert generate_greedy(model, ids, 10, chunk=7) == expected[:, 30:].tolist()


def test_end_tokens_come_from_the_generation_config_first(tiny_model):
    tiny_model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert end_tokens(tiny_model) == {7, 9}
    tiny_model.generation_config = GenerationConfig(eos_token_id=None)
    assert end_tokens(tiny_model) == {tiny_model.config.eos_token_id}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "0 positions"), ({"keep": 99}, "99 positions"), ({"chunk": 0}, "at least one token")],
)
def test_prefill_refuses_what_cannot_be(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        prefill(tiny_model, prompts(), **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_greedy(tiny_model, prompts(), 0)
