"""Memory that runs out while a cache is made or grows: what is kept can be read, and what is not is read again."""

import pytest
import torch
from test_generate import plain_tokens, prompts, tokens

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
