"""What the planner says waits on a GPU, against the trainer's layers, and its attention, against the real exchange."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from ultralong.attention import gathered, make_attention_context
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.layout import zigzag
from ultralong.attention.scheme import Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.attention.ulysses import Ulysses
from ultralong.planner import fake_gathered as stand_in
from ultralong.planner.fake_attention import Attention
from ultralong.planner.live_activations import Turn, at_the_loss, turns
from ultralong.planner.machine import load_machine
from ultralong.planner.memory import gpu_lines
from ultralong.planner.shapes import model_config, shape_of
from ultralong.planner.tracker import Tracker
from ultralong.planner.workload import Job
from ultralong.training.config import (
    DataSource,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from ultralong.training.memory import ActivationMemory
from ultralong.training.offload import OffloadedTensor
from ultralong.utils.local_ranks import run_ranks

LAYERS, TOKENS = 7, 24
SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
)
PLANS = {
    "all kept": {"attention_outputs_on_gpu": -1},
    "nothing kept": {},
    "results on the host": {"attention_outputs_offloaded": -1},
    "results in three places": {"attention_outputs_on_gpu": 2, "attention_outputs_offloaded": 3},
    "inputs on the host": {
        "attention_outputs_on_gpu": 1,
        "attention_outputs_offloaded": -1,
        "layer_inputs_offloaded": -1,
    },
    "some inputs on the host": {
        "attention_outputs_on_gpu": 3,
        "attention_outputs_offloaded": 1,
        "layer_inputs_offloaded": 4,
    },
    "every third input": {"attention_outputs_on_gpu": 2, "attention_outputs_offloaded": -1, "checkpoint_every": 3},
    "every third input, on the host": {
        "attention_outputs_on_gpu": 2,
        "attention_outputs_offloaded": -1,
        "checkpoint_every": 3,
        "layer_inputs_offloaded": 2,
    },
    "every fourth input, first results computed again": {
        "attention_outputs_on_gpu": 1,
        "attention_outputs_offloaded": 2,
        "checkpoint_every": 4,
    },
    "one input, nothing else": {"checkpoint_every": LAYERS},
}


def job_of(
    memory: MemoryConfig, shape: LlamaConfig = SMALL, tokens: int = TOKENS, gpus: int = 1, stages: int | None = None
) -> Job:
    config = TrainConfig(
        model="none",
        out="run",
        data=(DataSource("rows"),),
        steps=1,
        memory=memory,
        optimizer=OptimizerConfig(state_precision="8bit"),
        parallel=ParallelConfig(
            context_parallel_size=gpus, fsdp_shard_degree=gpus, kernel="flash4", head_chunks=stages
        ),
    )
    return Job(config, shape, shape_of(shape), load_machine("h200"), tokens, gpus)


@pytest.mark.parametrize("name", PLANS)
def test_each_turn_holds_what_the_trainers_layers_hold(name):
    """Counted in a real pass, when a layer's attention result has been taken and its own passes begin."""
    config = MemoryConfig(activation_checkpointing=True, layer_tile=8, **PLANS[name])
    model = AutoModelForCausalLM.from_config(SMALL, dtype=torch.float32, attn_implementation="ultralong").train()
    memory, found = ActivationMemory(model, config), []
    take = memory.attention_store.pop

    def on_device(waiting) -> int:
        return sum(not isinstance(x, OffloadedTensor) or x.on_device is not None for x in waiting)

    def taken(layer):
        pair = take(layer)
        results = on_device(out for out, _ in memory.attention_store._stored.values())
        found.append(Turn(LAYERS - 1 - layer, 1 + on_device(memory.input_store._stored.values()), results))
        return pair

    memory.attention_store.pop = taken
    context = make_attention_context(TOKENS, heads=2, kv_heads=1, store=memory.attention_store)
    ids, places = torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None]
    logits = model(input_ids=ids, position_ids=places, use_cache=False, attention_context=context).logits
    job = job_of(config)
    assert at_the_loss(job) == Turn(
        0,
        on_device(memory.input_store._stored.values()),
        on_device(out for out, _ in memory.attention_store._stored.values()),
    )
    logits.sum().backward()
    assert turns(job) == found


class AllocatingKernel(Reference):
    """Allocates what flash-attn 4 does and computes nothing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], q.shape[2], q.shape[1])

    def backward(self, dout, q, k, v, out, lse, spec):
        sums = [torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
        delta = torch.empty_like(lse)
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        del sums, delta
        return tuple(grads)

    def backward_accumulate(self, dout, q, k, v, out, lse, spec, dk, dv):
        return self.backward(dout, q, k, v, out, lse, spec)[0]


class Allocating(Scheme):
    """The same as one rank's scheme."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], q.shape[2], q.shape[1])

    def attend_backward(self, dout, q, k, v, out, lse, spec, *, fp32_grads=False):
        sums = [torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
        delta = torch.empty_like(lse)
        kind = torch.float32 if fp32_grads else k.dtype
        grads = [torch.empty(x.shape, dtype=t) for x, t in ((q, q.dtype), (k, kind), (v, kind))]
        del sums, delta
        return tuple(grads)


def tensors(heads: int, kv_heads: int) -> list[Tensor]:
    """Of q, k, v, out and its gradient."""
    return [torch.zeros(1, 64, n, 8, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads, heads)]


def passes_peaks(scheme, *tensors: Tensor) -> list[int]:
    """Most bytes of a forward and of a backward pass, beside what they are given."""
    (q, k, v, out, dout), peaks, spec = tensors, [], AttentionSpec(scale=1.0)
    with Tracker() as tracker:
        lse = scheme.forward(q, k, v, spec)[1]
        peaks.append(tracker.peak)
    with Tracker() as tracker:
        scheme.backward(dout, q, k, v, out, lse, spec)
        peaks.append(tracker.peak)
    return peaks


def exchanged_peaks(rank: int, world: int, heads: tuple[int, int], stages: int) -> list[int]:
    """Those of the real exchange: the least of some runs, as gloo's threads hold a buffer longer now and then."""
    scheme = Ulysses(dist.group.WORLD, Allocating(), stages)
    return [min(peaks) for peaks in zip(*(passes_peaks(scheme, *tensors(*heads)) for _ in range(5)))]


@pytest.mark.parametrize(
    ("heads", "stages"), [((8, 4), 1), ((8, 4), 2), ((8, 2), 2), ((8, 2), 4), ((8, 1), 1), ((8, 1), 2)]
)
def test_the_stand_in_for_attention_holds_as_much_as_the_exchange(heads, stages):
    real = run_ranks(exchanged_peaks, 2, heads, stages)[0]
    assert passes_peaks(Attention(stages, 2), *tensors(*heads)) == pytest.approx(real, rel=0.03)


def gathered_peaks(rank: int, world: int, heads: tuple[int, int], stages: int, at_once: int) -> list[int]:
    with patch.object(gathered, "BUFFER_BYTES", at_once):
        layout = zigzag(64 * world, world)
        scheme = gathered.Gathered(dist.group.WORLD, layout, AllocatingKernel(), head_chunks=stages)
        row = [x.float() for x in tensors(*heads)]
        return [min(peaks) for peaks in zip(*(passes_peaks(scheme, *row) for _ in range(5)))]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("heads", "stages", "at_once"),
    [((9, 3), 1, 2**30), ((9, 3), 3, 2**30), ((9, 3), 1, 2**15), ((8, 4), 2, 2**30), ((8, 4), 1, 2**30)],
)
def test_the_stand_in_for_gathered_keys_holds_as_much_as_they_do(world, heads, stages, at_once, monkeypatch):
    real = run_ranks(gathered_peaks, world, heads, stages, at_once)[0]
    monkeypatch.setattr(stand_in, "BUFFER_BYTES", at_once)
    row = [x.float() for x in tensors(*heads)]
    assert passes_peaks(stand_in.Gathered(stages, world), *row) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize(
    ("scheme", "gpus", "heads", "gathers"),
    [
        ("auto", 1, (9, 3), False),
        ("auto", 2, (9, 3), True),
        ("auto", 3, (9, 3), False),
        ("auto", 4, (8, 2), False),
        ("gathered", 4, (8, 8), True),
        ("ring", 2, (9, 3), False),
    ],
)
def test_keys_are_gathered_where_the_heads_do_not_split_or_it_is_asked_for(scheme, gpus, heads, gathers):
    """Where it is asked for, with many kv heads, they and their gradients in float32 are more than what is traded."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=8 * heads[0],
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=8,
    )
    job = job_of(MemoryConfig(activation_checkpointing=True), shape, 4096, gpus)
    asked = replace(job, config=replace(job.config, parallel=replace(job.config.parallel, scheme=scheme)))
    assert asked.gathered == gathers
    if scheme == "gathered":
        assert asked.trace.peak > job.trace.peak


def worst(job: Job) -> dict[str, float]:
    return {line.name: line.value for line in gpu_lines(job) if line.counts}


def test_the_worst_moment_is_the_first_turn_or_a_later_one_with_more_gradients():
    """Llama-3.1-8B on one GPU: with every eighth input kept, groups made again weigh the same, and gradients come."""
    shape = model_config("meta-llama/Llama-3.1-8B")
    plan = MemoryConfig(
        activation_checkpointing=True,
        loss_tile=8192,
        layer_tile=32768,
        attention_outputs_on_gpu=2,
        attention_outputs_offloaded=30,
    )
    first, later = (worst(job_of(replace(plan, checkpoint_every=every), shape, 7 * 2**16)) for every in (1, 8))
    assert "tensors: inputs of 32 layers" in first
    assert "tensors: gradients, float32" not in first
    assert "tensors: inputs of 8 layers" in later
    assert later["tensors: gradients, float32"] == pytest.approx(24 * 4 * 218e6, rel=0.01)
    assert sum(later.values()) < sum(first.values())
