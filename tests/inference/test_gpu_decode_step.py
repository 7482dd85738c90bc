"""On GPUs: a decoding step's kernels, its CUDA graph and its exchange against the model's own code."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from test_decode_step import SHAPE
from test_gpu_evaluation import RANKS
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ultralong import attention
from ultralong.inference.decode_step.exchange import WAYS
from ultralong.inference.decoding import Sampling
from ultralong.inference.generate import generate
from ultralong.inference.kv_cache import LayerBuffer, quantize_fp8
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import RankFailed, run_ranks

WIDE = SHAPE | {
    "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "initializer_range": 0.05,
}  # fmt: skip


def steps(rank, world, kind, kv, way="auto"):
    """How far each step's logits are from those of the model's own code, in spreads; and whether a graph was made."""
    torch.manual_seed(0)
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
    model = kinds[kind][0]._from_config(kinds[kind][1](**WIDE), attn_implementation=attention.NAME).bfloat16()
    model = model.cuda().eval()
    group = dist.group.WORLD if world > 1 else None
    plain = ShardedRunner(model, 6000, group, kv=kv, chunk=1024, fused=False)
    fused = ShardedRunner(model, 6000, group, kv=kv, chunk=1024, exchange=way)
    assert plain.step is None
    assert fused.step is not None
    ids = torch.randint(0, 64, (1, 5000), generator=torch.Generator().manual_seed(1)).cuda()
    plain.prefill(ids, [20])
    fused.prefill(ids, [20])
    token, apart = ids[:, -1], []
    for _ in range(8):
        expected, found = plain.decode(token).float(), fused.decode(token).float()
        apart.append(float((found - expected).abs().mean() / expected.std()))
        token = expected.argmax(-1)
    return apart, fused.step is not None and fused.step._graph is not None


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("held", [1, 63, 5000])
def test_split_attention_equals_float64(size, kv, held):
    """With keys and values of many sizes, and a value of zeros."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from ultralong.inference.decode_step import kernels

    draw = torch.Generator().manual_seed(held)
    q = torch.randn(2, 8, size, generator=draw).bfloat16().cuda()
    tensors = torch.randn(2, 2, 2, 5003, size, generator=draw)
    tensors *= torch.exp2(torch.randint(-9, 3, (2, 2, 2, 5003, 1), generator=draw).float())
    tensors[1, :, :, 3] = 0
    parts = [quantize_fp8(x.cuda()) if kv == "fp8" else (x.bfloat16().cuda(), None) for x in tensors]
    buffers = [LayerBuffer(*part, torch.bfloat16) for part in parts]
    place = torch.tensor([held, held - 1, 1]).cuda()
    out, lse = kernels.attend(q, buffers, place, size**-0.5)
    k, v = (x.double() if scale is None else x.double() * scale.double() for x, scale in parts)
    scores = torch.einsum("bkgd,bktd->bkgt", q.double().unflatten(1, (2, 4)), k[:, :, :held]) * size**-0.5
    expected = torch.einsum("bkgt,bktd->bkgd", scores.softmax(-1), v[:, :, :held]).flatten(1, 2)
    # Weights are rounded to float16, or to bfloat16 beside bfloat16's values.
    assert (out - expected).abs().max() < (2e-3 if kv == "fp8" else 1e-2) * expected.abs().max()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).flatten(1, 2) / math.log(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_steps_equal_the_models_own(world, kind, kv):
    found = run_ranks(steps, world, kind, kv, device="cuda") if world > 1 else [steps(0, 1, kind, kv)]
    for apart, graph in found:
        assert max(apart) < 0.05, apart
        assert graph


@pytest.mark.parametrize("way", ["direct", "gather", "symmetric"])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_gpus_join_their_attention_in_other_ways(way, kv):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for apart, graph in run_ranks(steps, 2, "llama", kv, way, device="cuda"):
        assert max(apart) < 0.05, apart
        assert graph


def logits_of_all(rank, world, kv):
    """Of each way the logits (N, V) of the same 40 tokens behind the same prompt, and which way it was."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**WIDE), attn_implementation=attention.NAME).bfloat16()
    ids, found = torch.randint(0, 64, (1, 3000), generator=torch.Generator().manual_seed(1)).cuda(), []
    model = model.cuda().eval()
    for way in WAYS:
        runner = ShardedRunner(model, 4000, dist.group.WORLD, kv=kv, chunk=1024, quiet=True, exchange=way)
        runner.prefill(ids, [50])
        logits = torch.cat([runner.decode(ids[:, step]) for step in range(40)])
        assert runner.step is not None
        found.append((way, runner.step.exchange, logits.float().cpu().numpy()))
    return found


@pytest.mark.multigpu
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_all_ways_give_equal_bits(kv):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for found in run_ranks(logits_of_all, 2, kv, device="cuda"):
        expected = found[WAYS.index("direct")][2]
        for way, chosen, logits in found:
            assert chosen == way or (way == "auto" and chosen in ("direct", "symmetric"))
            assert (logits == expected).all(), way


def answers(rank, world, kv):
    """Of each way, answers drawn and greedy, one ended by a stop token, and the logits of a step after them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**WIDE), attn_implementation=attention.NAME).bfloat16()
    model, group = model.cuda().eval(), dist.group.WORLD if world > 1 else None
    ids, found = torch.randint(0, 64, (1, 3000), generator=torch.Generator().manual_seed(1)).cuda(), []
    for ahead in (False, True):
        runner = ShardedRunner(model, 4000, group, kv=kv, chunk=1024, quiet=True, ahead=ahead)
        said = [
            generate(runner, ids, 40, sampling=sampling, stop=())[0].tokens
            for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3))
        ]
        said.append(generate(runner, ids, 40, stop={said[0][25]})[0].tokens)
        found.append((said, runner.cache.held(), runner.decode(ids[:, 0]).float().cpu().numpy()))
        assert runner.step is not None
        assert runner.step.checked
    return found


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_steps_started_before_their_token_is_read_give_the_same(world, kv):
    for waiting, ahead in run_ranks(answers, world, kv, device="cuda"):
        assert ahead[:2] == waiting[:2]
        assert (ahead[2] == waiting[2]).all(), "logits, to the bit"


def lose_one(rank, world, way):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**WIDE), attn_implementation=attention.NAME).bfloat16()
    runner = ShardedRunner(model.cuda().eval(), 4000, dist.group.WORLD, chunk=1024, quiet=True, exchange=way)
    ids = torch.randint(0, 64, (1, 3000), generator=torch.Generator().manual_seed(1)).cuda()
    runner.prefill(ids, [900])
    for step in range(900):
        if step == 10 and rank == 1:
            os._exit(3)
        runner.decode(ids[:, step]).argmax().item()


@pytest.mark.multigpu
@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_is_lost_ends_the_others(way):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(RankFailed, match="process ended with exit code 3"):
        run_ranks(lose_one, 2, way, device="cuda")
