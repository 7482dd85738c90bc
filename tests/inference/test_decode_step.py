"""Decoding steps by fused operations give what the model's own code gives, for every architecture and cache."""

import sys

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ultralong import attention
from ultralong.inference.decode_step import plain as in_torch
from ultralong.inference.decode_step import step as fused_step
from ultralong.inference.decode_step.step import DecodeStep, unsupported_reason
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention.NAME).eval()
    for parameter in model.parameters():  # norms and biases that make a difference
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_steps_equal_the_models_own(kind, kv):
    model = make(CONFIGS[kind])
    plain, fused = (ShardedRunner(model, 40, kv=kv, chunk=7, fused=way) for way in (False, True))
    assert fused.step is None, "on a CPU the model's own code runs"
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    before = plain.prefill(ids, [20])
    fused.prefill(ids, [20])
    fused.step = DecodeStep(model, fused.cache, None)
    token = ids[:, -1]
    for _ in range(6):
        expected, found = plain.decode(token), fused.decode(token)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # some norms are float32 there
        token = expected.argmax(-1)
    assert fused.cache.length == 26
    plain.release()
    torch.testing.assert_close(plain.prefill(ids, [20]), before)  # the model's weights are views now, and the same


def test_what_is_joined_leaves_nothing_that_counts_as_taken(monkeypatch):
    """The server asks the GPU what is free, and torch keeps what it has freed."""
    model, given_back = make(CONFIGS["llama"]), []

    def give_back():
        mlp = model.model.layers[-1].mlp
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        given_back.append(gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr())

    monkeypatch.setattr(fused_step, "is_fast", lambda model: True)
    monkeypatch.setitem(sys.modules, "ultralong.inference.decode_step.kernels", in_torch)
    monkeypatch.setattr(torch.cuda, "empty_cache", give_back)
    assert ShardedRunner(model, 40).step is not None
    assert given_back == [True], "once, when all are joined"


@torch.inference_mode()
def test_a_step_that_is_wrong_is_left_out(caplog):
    model = make(CONFIGS["llama"])
    runner = ShardedRunner(model, 40, chunk=7)
    ids = torch.arange(20)[None]
    runner.prefill(ids, [9])
    step = runner.step = DecodeStep(model, runner.cache, None)
    runner.decode(ids[:, 3])
    assert runner.step is step
    assert step.checked
    other = runner.step = DecodeStep(model, runner.cache, None)
    other._layers.reverse()
    expected = ShardedRunner(model, 40, chunk=7).prefill(torch.cat([ids, ids[:, 3:5]], 1))
    torch.testing.assert_close(runner.decode(ids[:, 4]), expected, rtol=1e-6, atol=1e-6)
    assert runner.step is None
    assert "apart from it" in caplog.text


@torch.inference_mode()
def test_a_full_cache_is_refused():
    model = make(CONFIGS["llama"])
    runner = ShardedRunner(model, 21, chunk=7)
    ids = torch.arange(20)[None]
    runner.prefill(ids, [1])
    runner.step = DecodeStep(model, runner.cache, None)
    runner.decode(ids[:, -1])
    assert runner.step.checked
    with pytest.raises(ValueError, match="holds 21 tokens and 22 were given"):
        runner.decode(ids[:, -1])


@torch.inference_mode()
def test_parts_of_a_sequence_join():
    """Two caches that hold a sequence's halves give, joined, what one that holds it gives."""
    from ultralong.inference.decode_step import plain
    from ultralong.inference.kv_cache import KvCache

    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 10, 2, 8, dtype=torch.float64)
    q = torch.randn(1, 4, 8, dtype=torch.float64)
    parts = []
    for tokens in (slice(0, 4), slice(4, 10), slice(0, 10)):
        cache = KvCache(16)
        cache.write(0, 0, k[:, tokens], v[:, tokens])
        place = torch.tensor([10, tokens.stop - tokens.start, 0])
        parts.append(plain.attend(q, cache.layers[0], place, 0.3))
    outs, lses = (torch.stack(x) for x in zip(*parts[:2], strict=True))
    out, lse = plain.merge(outs, lses, torch.float64)
    torch.testing.assert_close(out, parts[2][0])
    torch.testing.assert_close(lse, parts[2][1])


def test_other_models_say_why_not(make_tiny_model):
    model = make_tiny_model()
    assert unsupported_reason(model) is None
    model.model.norm.register_forward_hook(lambda *_: None)
    assert "hooks" in unsupported_reason(model)
    long = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert "length of the text" in unsupported_reason(make(long))


@torch.inference_mode()
def joined_steps(rank, world, way):
    """How far two ranks' steps are from those of the model's own code; each holds its part of the cache."""
    model, group = make(CONFIGS["qwen3"]), dist.group.WORLD
    plain, fused = (ShardedRunner(model, 40, group, chunk=8, fused=False) for _ in range(2))
    ids = torch.randint(0, 64, (1, 21), generator=torch.Generator().manual_seed(1))
    plain.prefill(ids, [12])
    fused.prefill(ids, [12])
    fused.step = DecodeStep(model, fused.cache, group, exchange=way)
    token, apart = ids[:, -1], []
    for _ in range(8):
        expected, found = plain.decode(token), fused.decode(token)
        apart.append(float((found - expected).abs().max()))
        token = expected.argmax(-1)
    return max(apart), fused.step is not None and fused.step.checked


@pytest.mark.parametrize("way", ["direct", "gather"])
def test_ranks_join_their_attention(way):
    for apart, checked in run_ranks(joined_steps, 2, way):
        assert apart < 1e-4
        assert checked


def test_results_are_written_where_they_are_sent_from():
    from ultralong.inference.decode_step import plain
    from ultralong.inference.kv_cache import KvCache

    cache = KvCache(16)
    cache.write(0, 0, *torch.randn(2, 1, 4, 2, 8))
    q, place = torch.randn(1, 4, 8), torch.tensor([4, 4, 0])
    into = torch.empty(1, 4, 8), torch.empty(1, 4)
    found = plain.attend(q, cache.layers[0], place, 0.3, into)
    assert [x is y for x, y in zip(found, into, strict=True)] == [True, True]
    for x, y in zip(into, plain.attend(q, cache.layers[0], place, 0.3), strict=True):
        assert torch.equal(x, y)


def test_ways_of_joining_are_named():
    from ultralong.bench import decode_options
    from ultralong.inference.decode_step import exchange, plain
    from ultralong.inference.server import settings

    assert decode_options.WAYS == exchange.WAYS == settings.EXCHANGES
    rest = None, 2, plain, 36, torch.device("cpu")
    with pytest.raises(ValueError, match="exchange takes auto, direct, gather, symmetric, found 'ring'"):
        exchange.make_exchange("ring", *rest)
    with pytest.raises(ValueError, match="symmetric is for GPUs"):
        exchange.make_exchange("symmetric", *rest)
    with pytest.raises(ValueError, match="exchange takes auto, direct"):
        decode_options.DecodeBench("m", exchange=("ring",))
