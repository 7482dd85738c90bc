"""Memory that runs out while a cache is made or grows: what is kept can be read, and what is not is read again."""

import pytest
import torch
from test_generate import plain_tokens, prompts, tokens

from ultralong.inference.batched import BatchedRunner
from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.decode_step import plain
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.kv_cache import KvCache, LayerBuffer
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.sharded_generation import ShardedRunner


def fails_at(monkeypatch, name, call):
    """Have the `call`-th buffer that is made (`allocate`) or grown (`resized`) find no memory, once."""
    real, calls = getattr(LayerBuffer, name), []

    def make(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(LayerBuffer, name, make)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_cache_that_cannot_grow_is_what_it_was(kv, call, monkeypatch):
    cache, written = KvCache(8, kv), torch.randn(2, 2, 1, 6, 3, 16)  # (layers, keys and values, B, T, K, D)
    for layer, (k, v) in enumerate(written):
        cache.write(layer, 0, k, v)
    cache.append(6)
    before = [x.clone() for layer in (0, 1) for x in cache.read(layer, slice(6))]
    generation = cache.generation
    fails_at(monkeypatch, "resized", call)

    def kept():
        return all(
            torch.equal(a, b) for a, b in zip(before, [x for n in (0, 1) for x in cache.read(n, slice(6))], strict=True)
        )

    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(20)
    assert (cache.capacity, cache.length) == (8, 6)
    assert kept()
    for keys, values in cache.layers.values():
        assert keys.values.shape == values.values.shape, "the fused step reads both by the keys' strides"
    assert cache.generation > generation, "no graph reads a buffer that is gone"
    with pytest.raises(ValueError, match="holds 8 tokens and 12 were given"):
        cache.write(0, 6, *written[0])
    cache.reserve(20)
    assert cache.capacity == 20
    assert kept()
    for layer, (k, v) in enumerate(written):
        cache.write(layer, 14, k, v)  # up to the last


@pytest.mark.parametrize("kind", [LocalRunner, ShardedRunner])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_answer_after_one_that_did_not_fit_is_right(make_tiny_model, kind, call, monkeypatch):
    """The same prompt, and one that shares more with the prompt before than with the one that did not fit."""
    model, ids = make_tiny_model(2).double(), prompts(1, 40)
    other = torch.cat([ids[:, :10], prompts(1, 50, 3)], 1)
    runner = kind(model, quiet=True)
    expected = [plain_tokens(model, x, 5, stop=set()) for x in (ids, other)]
    tokens(runner, ids, 5, stop=set())
    fails_at(monkeypatch, "resized", call)
    with pytest.raises(torch.OutOfMemoryError):
        tokens(runner, other, 5, stop=set())
    assert tokens(runner, ids, 5, stop=set()) == expected[0]
    assert runner.reused == 10, "only what both share was kept"
    assert tokens(runner, other, 5, stop=set()) == expected[1]


@pytest.mark.parametrize("kind", [LocalRunner, ShardedRunner])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_first_prompt_that_did_not_fit_can_be_asked_again(make_tiny_model, kind, call, monkeypatch):
    model, ids = make_tiny_model(2).double(), prompts(1, 40)
    expected = plain_tokens(model, ids, 5, stop=set())
    runner = kind(model, quiet=True)
    fails_at(monkeypatch, "allocate", call)
    with pytest.raises(torch.OutOfMemoryError):
        tokens(runner, ids, 5, stop=set())
    assert tokens(runner, ids, 5, stop=set()) == expected
    assert runner.reused == 0


class Once:
    """A hook that finds no memory at its `call`-th call, once."""

    def __init__(self, call):
        self.call, self.calls = call, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.call:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("kind", [LocalRunner, ShardedRunner, BatchedRunner])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_that_did_not_fit_can_be_taken_again(make_tiny_model, kind, layer):
    """Some layers have written the token by then; it is neither counted nor left out."""
    model, ids = make_tiny_model(2).double(), prompts(1, 20)
    runner, token = kind(model), torch.tensor([7])
    expected = LocalRunner(model).prefill(torch.cat([ids, token[None], token[None]], 1))
    runner.prefill(ids, [4])
    runner.decode(token)
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(Once(1))
    with pytest.raises(torch.OutOfMemoryError):
        runner.decode(token)
    handle.remove()
    torch.testing.assert_close(runner.decode(token), expected)


def test_a_step_of_several_rows_that_did_not_fit_can_be_taken_again(make_tiny_model):
    model, ids = make_tiny_model(2).double(), prompts(1, 20)
    expected = [LocalRunner(model).prefill(torch.cat([ids[:, :n], ids[:, :1]], 1))[0] for n in (20, 9)]
    batch = ContinuousBatch(model, 3, 40)
    batch.begin({0: ids[0].tolist(), 2: ids[0, :9].tolist()})
    handle = model.model.layers[1].mlp.register_forward_pre_hook(Once(1))
    step = dict.fromkeys((0, 2), int(ids[0, 0]))
    with pytest.raises(torch.OutOfMemoryError):
        batch.step(step)
    handle.remove()
    found = batch.step(step)
    for row, wanted in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(found[row], wanted)


@torch.inference_mode()
def test_a_fused_step_that_failed_is_not_captured_by_the_next(make_tiny_model):
    """A graph is captured of a step that has run on these buffers: its kernels are compiled then."""
    model, ids = make_tiny_model(2), prompts(1, 20)
    runner = ShardedRunner(model, 40)
    runner.prefill(ids, [9])
    step = DecodeStep(model, runner.cache, None, plain)
    place = (20, 20, True)
    handle = model.model.rotary_emb.register_forward_pre_hook(Once(1))
    with pytest.raises(torch.OutOfMemoryError):
        step(ids[:, 0], *place)
    handle.remove()
    assert step._generation != runner.cache.generation
    step(ids[:, 0], *place)
    assert step._generation == runner.cache.generation
