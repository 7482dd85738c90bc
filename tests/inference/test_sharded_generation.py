"""Prompts read over several processes, in chunks, with 8-bit caches: what one process with plain ones would say."""

import random
from functools import cache

import pytest
import torch
import torch.distributed as dist
from test_env import ROOT
from test_generate import plain_tokens, prompts, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ultralong import miniature
from ultralong.evaluation.tasks.needle import make_needle
from ultralong.inference import sharded_attention
from ultralong.inference.generate import stream
from ultralong.inference.kv_cache import FP8, KvCache, quantize_fp8
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def make_model(kind, attention="ultralong"):
    torch.manual_seed(1)
    config = LlamaConfig(**SHAPE) if kind == "llama" else Qwen3Config(**SHAPE)
    model = (LlamaForCausalLM if kind == "llama" else Qwen3ForCausalLM)._from_config(
        config, attn_implementation=attention
    )
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharper attention: mistakes in it show
    return model.eval()


def read(rank, world, kind, cases):
    """Logits and tokens of each case (tokens of the prompt, chunk, rows)."""
    model, found = make_model(kind), []
    for length, chunk, rows in cases:
        runner = ShardedRunner(model, length + 12, dist.group.WORLD, chunk=chunk, quiet=True)
        ids = prompts(rows, length, length)
        logits = runner.prefill(ids)
        found.append((logits.numpy(), tokens(runner, ids, NEW, stop=set()), max(runner.cache.held(length))))
    return found


@cache
def plain_answers(kind):
    """Logits in one pass and tokens of each of `CASES`, by one process."""
    plain, found = make_model(kind, "sdpa"), []
    for length, _, rows in CASES:
        ids = prompts(rows, length, length)
        with torch.no_grad():
            found.append((plain(ids).logits[:, -1], plain_tokens(plain, ids, NEW, stop=set())))
    return found


NEW = 6
CASES = ((1, 4, 1), (3, 64, 1), (37, 8, 1), (101, 16, 2), (101, 1000, 1), (130, 33, 1), (50, 7, 1))


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        (1, "llama"),
        pytest.param(1, "qwen3", marks=pytest.mark.soak),
        (2, "llama"),
        (2, "qwen3"),
        (4, "llama"),
        pytest.param(4, "qwen3", marks=pytest.mark.soak),
    ],
)
def test_any_number_of_processes_equals_one(world, kind):
    ranks = run_ranks(read, world, kind, CASES)
    for index, ((length, chunk, _), (expected, answers)) in enumerate(zip(CASES, plain_answers(kind), strict=True)):
        for logits, said, held in (found[index] for found in ranks):
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5 * expected.abs().max())
            assert said == answers
            # The cache is shared out, not copied.
            assert held <= length / world + 2 * (length // chunk + 1)


# How long each prompt is, and how much of its beginning is the one before's.
PARTED = ((100, 120), (60, 120), (60, 90), (119, 120), (7, 120), (7, 121))


def reread(rank, world):
    model = make_model("llama")
    reader = ShardedRunner(model, 140, dist.group.WORLD, chunk=16, quiet=True)
    whole, found = prompts(1, 120, 1), []
    for parted, length in PARTED:
        ids = torch.cat([whole[:, :parted], prompts(1, 140, parted + length)], 1)[:, :length]
        found.append((tokens(reader, ids, 8, stop=set()), reader.reused))
        whole = ids
    return found


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_beginning_that_is_the_same_is_kept(world):
    model, whole = make_model("llama", "sdpa"), prompts(1, 120, 1)
    found = run_ranks(reread, world)[0]
    for (said, reused), (parted, length) in zip(found, PARTED, strict=True):
        ids = torch.cat([whole[:, :parted], prompts(1, 140, parted + length)], 1)[:, :length]
        assert said == plain_tokens(model, ids, 8, stop=set())
        assert reused <= parted
        whole = ids
    assert sum(reused for _, reused in found) > 100


def test_eight_bits_lose_a_sixteenth_at_most_and_nothing_of_powers_of_two():
    x = torch.randn(5, 7, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None, None]
    values, scales = quantize_fp8(x)
    assert values.dtype == FP8
    back = values.float() * scales.float()
    assert torch.isfinite(back).all()
    big = x.abs() > x.abs().amax(-1, keepdim=True) / 2**14
    assert ((back - x).abs() <= x.abs() / 16 + 1e-30)[big].all()
    assert torch.equal(back.to(torch.bfloat16).float(), back), "what is read in bfloat16 is exact"
    powers = 2.0 ** torch.arange(-6, 2).float()
    values, scales = quantize_fp8(powers[None])
    assert torch.equal(values.float() * scales.float(), powers[None])
    zero = quantize_fp8(torch.zeros(2, 8))
    assert torch.equal(zero[0].float() * zero[1].float(), torch.zeros(2, 8))


def answer_in(rank, world, kv):
    model, ids = make_model("llama"), prompts(2, 200, 5)
    reader = ShardedRunner(model, 220, dist.group.WORLD, chunk=32, kv=kv, quiet=True)
    logits = reader.prefill(ids)
    steps = torch.stack([reader.decode(token) for token in prompts(2, 8, 6).T])
    return logits.numpy(), steps.numpy(), reader.cache.bytes


@pytest.mark.parametrize("world", [1, 2])
def test_an_eight_bit_cache_takes_half_and_changes_little(world):
    (plain, plain_steps, size), (eight, eight_steps, small) = (
        run_ranks(answer_in, world, kv)[0] for kv in ("auto", "fp8")
    )
    model, ids = make_model("llama", "sdpa").bfloat16(), torch.cat([prompts(2, 200, 5), prompts(2, 8, 6)], 1)
    with torch.no_grad():
        half = model(ids).logits[:, 199:].float().numpy()
    # Relative to the logits' spread. For scale: what it does to compute in bfloat16 instead of float32.
    rounding = abs(half[:, 0] - plain).mean() / plain.std()
    effect = abs(eight - plain).mean() / plain.std()
    effect_later = abs(eight_steps - plain_steps).mean() / plain_steps.std()
    assert rounding < 0.05
    assert max(effect, effect_later) < 4 * rounding
    assert small / size == pytest.approx((16 + 2) / (16 * 4), abs=0.01), "of float32: a quarter, and the scales"


def pieces(rank, world, kv, held):
    """Tokens after a prompt that fills `held` tokens of each rank, read whole and in pieces of as many."""
    model, found = make_model("llama").bfloat16(), []
    for most in (sharded_attention.WIDENED_TOKENS, held):
        sharded_attention.WIDENED_TOKENS = most
        runner = ShardedRunner(model, world * held + 8, dist.group.WORLD, kv=kv, quiet=True)
        found.append(tokens(runner, prompts(1, world * held, 5), 6, stop=set()))
    return found


@pytest.mark.parametrize("held", [1, 8, 19])
def test_ranks_that_read_their_keys_in_unlike_numbers_of_pieces_merge_them(held):
    # After the first new token one rank holds a piece more than the other.
    first, second = run_ranks(pieces, 2, "fp8", held)
    assert first == second
    whole, in_pieces = first
    assert whole == in_pieces


def test_wide_caches_are_read_a_few_heads_at_a_time(monkeypatch):
    from ultralong.inference import sharded_attention

    model, ids = make_model("llama"), prompts(1, 90, 3)
    expected = ShardedRunner(model, 100, chunk=20, kv="fp8", quiet=True).prefill(ids)
    seen = []
    read_all = KvCache.read

    def watched(cache, layer, places, heads=slice(None)):
        keys, values = read_all(cache, layer, places, heads)
        seen.append(keys.numel())
        return keys, values

    monkeypatch.setattr(KvCache, "read", watched)
    monkeypatch.setattr(sharded_attention, "WIDENED_BYTES", 1)
    reader = ShardedRunner(model, 100, chunk=20, kv="fp8", quiet=True)
    torch.testing.assert_close(reader.prefill(ids), expected, rtol=0, atol=1e-5)
    assert max(seen) == 80 * 16, "one head's"
    monkeypatch.setattr(sharded_attention, "WIDENED_TOKENS", 10)
    seen.clear()
    token = prompts(1, 1, 9)[0]
    small = reader.decode(token)
    assert max(seen) == 10 * 3 * 16
    monkeypatch.undo()
    reader.cache.truncate(90)
    torch.testing.assert_close(reader.decode(token), small, rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused():
    hybrid = make_model("llama")
    hybrid.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of linear_attention"):
        ShardedRunner(hybrid, 100)
    model = make_model("llama")
    with pytest.raises(ValueError, match="auto or fp8, got 'int4'"):
        ShardedRunner(model, 100, kv="int4")
    with pytest.raises(ValueError, match="at least one token, got 0"):
        ShardedRunner(model, 100, chunk=0)
    with pytest.raises(ValueError, match="room for 1 to 100"):
        ShardedRunner(model, 100).prefill(prompts(1, 101))
    with pytest.raises(ValueError, match="do not fit"):
        tokens(ShardedRunner(model, 100), prompts(1, 95), 10)
    with pytest.raises(ValueError, match="max_new_tokens"):
        tokens(ShardedRunner(model, 100), prompts(1, 95), 0)


def test_a_trained_model_answers_the_same_from_eight_bits():
    """The miniature: needles found, and how far its next-token distribution moves in running text."""
    model = AutoModelForCausalLM.from_pretrained(miniature.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(miniature.path())
    plain, eight = (ShardedRunner(model, 560, chunk=128, kv=kv, quiet=True) for kv in ("auto", "fp8"))
    found = [0, 0]
    for sample in range(6):
        needle = make_needle(tokenizer, 512, (sample + 0.5) / 6, 0, sample=sample)
        ids = torch.from_numpy(needle.input_ids.astype("int64"))[None]
        for place, reader in enumerate((plain, eight)):
            said = tokens(reader, ids, len(needle.answer_ids), stop=set())[0]
            found[place] += said == list(needle.answer_ids)
    assert found == [6, 6]
    text = torch.tensor([tokenizer((ROOT / "README.md").read_text(encoding="utf-8"))["input_ids"][:440]])
    moved = []
    for end in range(400, 440, 5):
        before, after = (reader.prefill(text[:, :end]).log_softmax(-1) for reader in (plain, eight))
        moved.append(float((before.exp() * (before - after)).sum()))
    # Measured: 0.007 nats on average, 0.03 at most.
    assert 0 < sum(moved) / len(moved) < 0.015
    assert max(moved) < 0.1


def leave_and_grow(rank, world, kv):
    """Tokens of whole answers, with a stream that the first rank leaves early in between, and the cache's growth."""
    model, ids = make_model("llama"), prompts(1, 90, 7)
    runner = ShardedRunner(model, None, dist.group.WORLD, chunk=16, kv=kv, quiet=True)
    found = [tokens(runner, ids[:, :60], 8, stop=set())]
    steps = stream(runner, ids[:, :60], 8, stop=set())
    seen = 0
    for _ in steps:
        seen += 1
        if rank == 0 and seen == 3:
            steps.close()
    found.append(seen)
    for length in (60, 90):
        found += [tokens(runner, ids[:, :length], 8, stop=set()), runner.reused]
    runner.release()
    assert runner.cache.bytes == 0
    runner.prefill(ids[:, :5], [1])
    assert runner.cache.capacity < 60 / world, "what is given back is not taken again for less"
    runner.release()
    return [*found, tokens(runner, ids[:, :60], 8, stop=set()), runner.reused]


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("world", [1, 2])
def test_an_answer_can_be_left_and_the_cache_grows_and_is_given_back(world, kv):
    found = run_ranks(leave_and_grow, world, kv)
    first, seen, again, reused, longer, kept, anew, none = found[0]
    assert seen == 3
    assert first == again == anew
    assert (reused, kept, none) == (59, 60, 0)
    assert all(rest[0] == first and rest[1] in (3, 4) and rest[2:] == found[0][2:] for rest in found[1:])
    if kv == "auto":
        assert longer == plain_tokens(make_model("llama", "sdpa"), prompts(1, 90, 7), 8, stop=set())
    else:
        assert longer == tokens(
            ShardedRunner(make_model("llama"), 98, chunk=16, kv=kv, quiet=True), prompts(1, 90, 7), 8, stop=set()
        )


def test_a_cache_grows_and_forgets_without_losing_what_it_keeps():
    for kv in ("auto", "fp8"):
        cache, (k, v) = KvCache(8, kv, ranks=2, rank=1), torch.randn(2, 1, 6, 3, 16).unbind(0)
        cache.write(0, 0, k, v)
        cache.append(12, [[(0, 3), (9, 12)], [(3, 9)]])
        before = [x.clone() for x in cache.read(0, slice(6))]
        cache.reserve(20)
        assert (cache.capacity, cache.held(), cache.length, cache.rows) == (20, [6, 6], 12, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, cache.read(0, slice(6)), strict=True))
        cache.truncate(5)
        assert (cache.held(), cache.length) == ([3, 2], 5)
        cache.write(0, 2, k, v)
        assert torch.equal(cache.read(0, slice(2))[0], before[0][:, :2])
        with pytest.raises(ValueError, match="make it larger"):
            cache.write(0, 18, k, v)


def test_each_ranks_count_follows_every_token():
    draw, cache, owners = random.Random(0), KvCache(4096, ranks=3), []
    for _ in range(200):
        if draw.random() < 0.2:
            kept = draw.randint(0, len(owners) + 2)
            cache.truncate(kept)
            owners = owners[:kept]
        tokens = draw.choice([1, 1, 1, 7])
        ranges = [[], [], []]
        for place in range(tokens):
            owners.append(draw.randrange(3))
            ranges[owners[-1]].append((place, place + 1))
        cache.append(tokens, ranges)
        upto = draw.randint(0, len(owners) + 1)
        assert cache.held() == [owners.count(rank) for rank in range(3)]
        assert cache.held(upto) == [owners[:upto].count(rank) for rank in range(3)]
    cache.release()
    assert cache.held() == [0, 0, 0]
