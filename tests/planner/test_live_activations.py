"""Layer inputs and attention outputs that the planner counts on a GPU, against the trainer's own layers."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ultralong.attention import make_attention_context
from ultralong.planner.live_activations import LiveActivations, live_in_backward, live_in_loss
from ultralong.planner.machine import load_machine
from ultralong.planner.memory import gpu_memory
from ultralong.planner.shapes import model_config, shape_of
from ultralong.planner.workload import Workload
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.memory.activation_memory import ActivationMemory
from ultralong.training.memory.offload import OffloadedTensor

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
    "all stored": {"attention_outputs_on_gpu": -1},
    "nothing stored": {},
    "outputs offloaded": {"attention_outputs_offloaded": -1},
    "outputs in three places": {"attention_outputs_on_gpu": 2, "attention_outputs_offloaded": 3},
    "inputs offloaded": {
        "attention_outputs_on_gpu": 1,
        "attention_outputs_offloaded": -1,
        "layer_inputs_offloaded": -1,
    },
    "some inputs offloaded": {
        "attention_outputs_on_gpu": 3,
        "attention_outputs_offloaded": 1,
        "layer_inputs_offloaded": 4,
    },
    "every third input": {"attention_outputs_on_gpu": 2, "attention_outputs_offloaded": -1, "checkpoint_every": 3},
    "every third input, offloaded": {
        "attention_outputs_on_gpu": 2,
        "attention_outputs_offloaded": -1,
        "checkpoint_every": 3,
        "layer_inputs_offloaded": 2,
    },
    "every fourth input, first outputs recomputed": {
        "attention_outputs_on_gpu": 1,
        "attention_outputs_offloaded": 2,
        "checkpoint_every": 4,
    },
    "one input, nothing else": {"checkpoint_every": LAYERS},
}


def workload_of(memory: MemoryConfig, shape: LlamaConfig = SMALL, tokens: int = TOKENS, gpus: int = 1) -> Workload:
    config = TrainConfig(
        model="none",
        out="run",
        data=(DataSource("rows"),),
        steps=1,
        memory=memory,
        optimizer=OptimizerConfig(state_precision="8bit"),
        parallel=ParallelConfig(context_parallel_size=gpus, fsdp_shard_degree=gpus, kernel="flash4"),
    )
    return Workload(config, shape, shape_of(shape), load_machine("h200"), tokens, gpus)


@pytest.mark.parametrize("name", PLANS)
def test_each_layers_turn_holds_what_the_trainers_layers_hold(name):
    """Counted in a real pass, when a layer's attention output has been popped and its own passes begin."""
    config = MemoryConfig(activation_checkpointing=True, layer_tile=8, **PLANS[name])
    model = AutoModelForCausalLM.from_config(SMALL, dtype=torch.float32, attn_implementation="ultralong").train()
    memory, found = ActivationMemory(model, config), []
    take = memory.attention_store.pop

    def on_device(stored) -> int:
        return sum(not isinstance(x, OffloadedTensor) or x.on_device is not None for x in stored)

    def taken(layer):
        pair = take(layer)
        outputs = on_device(out for out, _ in memory.attention_store._stored.values())
        inputs = 1 + on_device(memory.input_store._stored.values())
        found.append(LiveActivations(LAYERS - 1 - layer, inputs, outputs, pair is not None))
        return pair

    memory.attention_store.pop = taken
    context = make_attention_context(TOKENS, heads=2, kv_heads=1, store=memory.attention_store)
    ids, places = torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None]
    logits = model(input_ids=ids, position_ids=places, use_cache=False, attention_context=context).logits
    workload = workload_of(config)
    assert live_in_loss(workload) == LiveActivations(
        0,
        on_device(memory.input_store._stored.values()),
        on_device(out for out, _ in memory.attention_store._stored.values()),
    )
    logits.sum().backward()
    assert live_in_backward(workload) == found


@pytest.mark.parametrize(
    ("scheme", "gpus", "heads", "taken"),
    [
        ("auto", 1, (9, 3), "single"),
        ("auto", 2, (9, 3), "gathered"),
        ("auto", 3, (9, 3), "ulysses"),
        ("auto", 4, (8, 2), "ulysses"),
        ("gathered", 4, (8, 8), "gathered"),
        ("ring", 2, (9, 3), "ring"),
        ("ring", 4, (8, 8), "ring"),
    ],
)
def test_a_row_is_planned_by_the_scheme_that_the_trainer_takes(scheme, gpus, heads, taken):
    """Where it is asked for, with many kv heads, gathered keys and their float32 gradients are more than Ulysses'."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=8 * heads[0],
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=8,
    )
    workload = workload_of(MemoryConfig(activation_checkpointing=True), shape, 4096, gpus)
    parallel = replace(workload.config.parallel, scheme=scheme)
    asked = replace(workload, config=replace(workload.config, parallel=parallel))
    assert asked.trace.attention.scheme == taken
    assert asked.trace.attention.exchanges == (gpus > 1)
    if scheme == "gathered":
        assert asked.trace.peak() > workload.trace.peak()


def worst(workload: Workload) -> dict[str, float]:
    return {line.name: line.value for line in gpu_memory(workload) if line.counts}


def test_the_worst_moment_is_the_first_turn_or_a_later_one_with_more_gradients():
    """Llama-3.1-8B on one GPU: with every eighth input stored, recomputed groups weigh the same, and gradients come."""
    shape = model_config("meta-llama/Llama-3.1-8B")
    plan = MemoryConfig(
        activation_checkpointing=True,
        loss_tile=8192,
        layer_tile=32768,
        attention_outputs_on_gpu=2,
        attention_outputs_offloaded=30,
    )
    first, later = (worst(workload_of(replace(plan, checkpoint_every=every), shape, 7 * 2**16)) for every in (1, 8))
    assert "tensors: inputs of 32 layers" in first
    assert "tensors: gradients, float32" not in first
    assert "tensors: inputs of 8 layers" in later
    assert later["tensors: gradients, float32"] == pytest.approx(24 * 4 * 218e6, rel=0.01)
    assert sum(later.values()) < sum(first.values())
