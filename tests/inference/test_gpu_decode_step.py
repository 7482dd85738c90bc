"""On GPUs: a decoding step's kernels, its CUDA graph and its exchange against the model's own code."""

import pytest
import torch
import torch.distributed as dist
from test_decode_step import SHAPE
from test_gpu_evaluation import RANKS
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ultralong import attention
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

WIDE = SHAPE | {
    "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "initializer_range": 0.05,
}  # fmt: skip


def steps(rank, world, kind, kv):
    """How far each step's logits are from those of the model's own code, in spreads; and whether a graph was made."""
    torch.manual_seed(0)
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
    model = kinds[kind][0]._from_config(kinds[kind][1](**WIDE), attn_implementation=attention.NAME).bfloat16()
    model = model.cuda().eval()
    group = dist.group.WORLD if world > 1 else None
    plain, fused = (ShardedRunner(model, 6000, group, kv=kv, chunk=1024, fused=way) for way in (False, True))
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


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_steps_equal_the_models_own(world, kind, kv):
    found = run_ranks(steps, world, kind, kv, device="cuda") if world > 1 else [steps(0, 1, kind, kv)]
    for apart, graph in found:
        assert max(apart) < 0.05, apart
        assert graph
