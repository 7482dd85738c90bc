"""Chunked prefill and greedy decoding equal transformers' own, token for token."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from ultralong.inference.decoding import Sampler, Sampling
from ultralong.inference.generate import generate, prefill, stream
from ultralong.inference.kv_cache import CacheLayer, make_cache
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.runner import as_tensor


def prompts(batch=2, tokens=40, seed=0):
    return torch.randint(2, 512, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tokens(runner, ids, budget, stop=None):
    """The new tokens of each prompt."""
    return [answer.tokens for answer in generate(runner, ids, budget, stop=stop)]


def plain_tokens(model, ids, budget, stop=None, chunk=None):
    """The same, without anything kept from prompts before."""
    return tokens(LocalRunner(model, chunk=chunk), ids, budget, stop)


@pytest.mark.parametrize("given", [[[]], [[3]], [(5, 2**40), (0, 7)]])
def test_prompts_become_a_tensor_of_their_ids(given):
    found = as_tensor(given, torch.device("cpu"))
    assert torch.equal(found, torch.tensor(given, dtype=torch.int64))


def test_a_prompt_becomes_a_tensor_without_torch_reading_its_list(monkeypatch):
    """Torch takes eight times as long for it, in which no other thread of a server runs."""
    prompts_of_two = [[5000, 2**40, 0], [1, 2, 3]]
    expected = torch.tensor(prompts_of_two)
    for name in ("tensor", "as_tensor", "LongTensor"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("torch reads the list"))
    made = as_tensor(prompts_of_two, torch.device("cpu"))
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)


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
        ours = plain_tokens(model, ids, 20, stop=set(), chunk=chunk)
        assert ours == expected[:, 30:].tolist()


def test_greedy_stops_at_each_rows_own_end(make_tiny_model):
    model, ids = make_tiny_model().double(), prompts(3, 30)
    free = plain_tokens(model, ids, 12, stop=set())
    stop = {free[0][4], free[1][2]}
    answers = generate(LocalRunner(model), ids, 12, stop=stop)
    stopped = [answer.tokens for answer in answers]
    for before, after in zip(free, stopped, strict=True):
        cut = next((place for place, token in enumerate(before) if token in stop), len(before))
        assert after == before[:cut]
    assert len(stopped[0]) <= 4
    reasons = ["stop" if len(answer) < 12 else "length" for answer in stopped]
    assert [answer.finish_reason for answer in answers] == reasons


def test_preallocated_cache_equals_a_growing_one_and_keeps_its_memory(tiny_model):
    config, growing = tiny_model.config, DynamicCache()
    fixed = make_cache(tiny_model, 24)
    assert isinstance(fixed.layers[0], CacheLayer)
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
    assert plain_tokens(model, ids, 10, chunk=7) == expected[:, 30:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "0 positions"), ({"keep": 99}, "99 positions"), ({"chunk": 0}, "at least one token")],
)
def test_prefill_refuses_what_cannot_be(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        prefill(tiny_model, prompts(), **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        plain_tokens(tiny_model, prompts(), 0)


def test_a_chunk_and_lengths_that_cannot_be_are_refused(tiny_model):
    with pytest.raises(ValueError, match="at least one token, got 0"):
        LocalRunner(tiny_model, chunk=0)
    with pytest.raises(ValueError, match="different lengths"):
        generate(LocalRunner(tiny_model), [[3, 4], [5]], 2)
    with pytest.raises(ValueError, match="for 2 prompts"):
        generate(LocalRunner(tiny_model), prompts(), [2])
    with pytest.raises(ValueError, match="do not fit"):
        generate(LocalRunner(tiny_model, 41), prompts(), 2)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_a_stream_gives_the_same_tokens_one_by_one_and_can_be_left(tiny_model):
    runner, ids = LocalRunner(tiny_model), prompts(2, 30)
    whole = tokens(runner, ids, 8, stop=set())
    steps = list(stream(runner, ids, 8, stop=set()))
    assert [list(said) for said in zip(*(step.tokens for step in steps), strict=True)] == whole
    assert [step.ended for step in steps] == [[None, None]] * 7 + [["length", "length"]]
    left = stream(runner, ids, 8, stop=set())
    next(left)
    left.close()
    assert tokens(runner, ids, 8, stop=set()) == whole


def test_samples_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    for temperature, top_p, kept in ((1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.9, 3), (1.0, 0.5, 1), (2.0, 0.7, 2)):
        wanted = (logits[0] / temperature).softmax(-1)
        wanted[kept:] = 0
        wanted = wanted / wanted.sum()
        drawn = Sampler(Sampling(temperature, top_p, seed=5))(logits)
        found = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.015)
        assert torch.equal(drawn, Sampler(Sampling(temperature, top_p, seed=5))(logits))
    first, second = (Sampler(Sampling(1.0))(logits) for _ in range(2))
    assert not torch.equal(first, second), "without a seed every draw is another"


def test_sampled_answers_repeat_under_a_seed_and_differ_under_another(tiny_model):
    runner, ids = LocalRunner(tiny_model), prompts(2, 20)
    said = [
        [answer.tokens for answer in generate(runner, ids, 12, sampling=Sampling(1.5, 0.95, seed), stop=set())]
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1]
    assert said[0] != said[2]
