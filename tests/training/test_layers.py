"""Layers with their backward passes written out: loss and every gradient are those of transformers' own layers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from ultralong.attention import make_attention_context
from ultralong.attention.spec import VarlenSegments
from ultralong.planner.traces.kernel import AllocatingKernel
from ultralong.training.config import MemoryConfig
from ultralong.training.loss import LanguageModelLoss
from ultralong.training.memory.activation_memory import ActivationMemory
from ultralong.training.memory.tiled import tiled

SMALL = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "head_dim": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHAPES = {
    "llama": LlamaConfig(**SMALL),
    "mistral, window": MistralConfig(**SMALL, sliding_window=20),
    "qwen2, biases": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen2, windows in upper layers": Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=3,
    ),
    "qwen3, normed heads": Qwen3Config(**SMALL),
}
PLANS = {
    "all kept": {"attention_outputs_on_gpu": -1},
    "all computed again": {},
    "some on the host": {"attention_outputs_on_gpu": 2, "attention_outputs_offloaded": 3, "layer_inputs_offloaded": 4},
    "every third input": {
        "attention_outputs_on_gpu": 2,
        "attention_outputs_offloaded": -1,
        "checkpoint_every": 3,
        "layer_inputs_offloaded": 2,
    },
    "every fifth input, first results computed again": {
        "attention_outputs_on_gpu": 1,
        "attention_outputs_offloaded": 3,
        "checkpoint_every": 5,
    },
    "one input, nothing else": {"checkpoint_every": 7},
}
TOKENS = 61  # no multiple of the tile


def gradients(model, boundaries, tile, head_chunks=None, kernel="auto", rows=2, **plan):
    """Loss and gradients of one pass; `tile` 0 is transformers' own layers."""
    model = copy.deepcopy(model)
    memory = (
        ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=tile, **plan)) if tile else None
    )
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 160, (rows, TOKENS), generator=generator)
    labels = torch.randint(0, 160, (rows, TOKENS), generator=generator)
    text = model.config
    context = make_attention_context(
        TOKENS,
        boundaries=boundaries,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_chunks=head_chunks,
        kernel=kernel,
        store=memory.attention_store if memory else None,
    )
    total, _ = LanguageModelLoss(model, 16)(
        input_ids=ids, labels=labels, attention_context=context, position_ids=torch.arange(TOKENS)[None]
    )
    total.backward()
    if memory:
        assert not memory.attention_store._stored, "everything kept has been given up"
        assert not memory.input_store._stored
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_is_that_of_transformers_layers(shape, plan):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float64, attn_implementation="ultralong")
    for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide mistakes
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    boundaries = (0, 1, 30, TOKENS) if "window" not in shape and plan != "all kept" else None
    plain, expected = gradients(model, boundaries, 0)
    loss, found = gradients(model, boundaries, 16, **PLANS[plan])
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name


@pytest.mark.parametrize("boundaries", [None, (0, 30, 31, TOKENS)])
def test_head_chunks_on_one_process_change_no_bit(boundaries):
    model = AutoModelForCausalLM.from_config(SHAPES["llama"], attn_implementation="ultralong")
    whole, chunks = (gradients(model, boundaries, 16, count, attention_outputs_on_gpu=3) for count in (None, 2))
    assert torch.equal(whole[0], chunks[0])
    assert {name for name, grad in whole[1].items() if not torch.equal(grad, chunks[1][name])} == set()


class Operations(TorchDispatchMode):
    """Counts operations, and numbers that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.count += 1
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(kwargs or {}))


def test_a_packed_row_costs_a_layer_no_operation_more():
    """With a kernel that takes packed rows: what is made of the documents is made once a step, not in each layer."""
    more = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SMALL | {"num_hidden_layers": layers}), attn_implementation="ultralong"
        )
        counts = []
        for boundaries in (None, (0, 5, 9, 30, 31, 44, TOKENS)):
            with Operations() as counted:
                gradients(model, boundaries, 16, None, AllocatingKernel("flash4"), 1, attention_outputs_on_gpu=-1)
            counts.append((counted.count, counted.waits))
        more.append([packed - whole for whole, packed in zip(*counts, strict=True)])
    assert more[0] == more[1]
    assert (more[0][0] < 20, more[0][1]) == (True, 0)


def test_the_documents_of_several_rows_are_laid_end_to_end_once():
    one = VarlenSegments((0, 2, 5), (0, 3, 5))
    both = one.repeat(2)
    assert (both.q, both.k) == ((0, 2, 5, 7, 10), (0, 3, 5, 8, 10))
    assert one.repeat(2) is both, "its cu_seqlens are on the device already"
    assert one.repeat(3).q[-1] == 15


def test_a_row_shorter_than_a_tile_is_one_tile():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES["llama"], dtype=torch.float64, attn_implementation="ultralong")
    _, expected = gradients(model, None, 0)
    _, found = gradients(
        model, None, 2 * TOKENS, attention_outputs_on_gpu=2, attention_outputs_offloaded=3, checkpoint_every=4
    )
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name


def test_under_autocast_the_layers_round_as_transformers_do():
    """bfloat16 products on float32 weights: as near to float32 as transformers' own layers are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES["llama"], dtype=torch.float32, attn_implementation="ultralong")
    _, exact = gradients(model, None, 0)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = gradients(model, None, 0)
        _, ours = gradients(model, None, 16, attention_outputs_on_gpu=3, checkpoint_every=3)
    for name, grad in exact.items():
        error = (theirs[name] - grad).norm()
        assert ours[name].dtype == torch.float32
        assert (ours[name] - grad).norm() <= 1.2 * error + 1e-3 * grad.norm(), name


def test_without_a_context_the_layers_are_transformers_own(make_tiny_model):
    model = make_tiny_model()
    ids = torch.arange(20)[None]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=8))
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_a_pass_without_gradients_keeps_nothing(make_tiny_model):
    model = make_tiny_model()
    memory = ActivationMemory(
        model, MemoryConfig(activation_checkpointing=True, layer_tile=8, attention_outputs_on_gpu=-1)
    )
    context = make_attention_context(20, heads=4, kv_heads=2, store=memory.attention_store)
    with torch.no_grad():
        model(torch.arange(20)[None], attention_context=context, use_cache=False)
    assert not memory.attention_store._stored


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Gemma2Config(**SMALL), "Gemma2DecoderLayer is not known to it: set memory.layer_tile to 0"),
        (LlamaConfig(**SMALL, attention_dropout=0.1), "without dropout, found attention_dropout=0.1"),
    ],
)
def test_layers_that_are_not_known_are_refused(config, said):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=said):
        ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=8))


def test_hidden_tokens_and_caches_are_refused(make_tiny_model):
    model = make_tiny_model()
    ActivationMemory(model, MemoryConfig(activation_checkpointing=True, layer_tile=8))
    context = make_attention_context(20, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="pass boundaries to make_attention_context"):
        model(torch.arange(20)[None], attention_context=context, use_cache=True)


def test_a_tile_without_tokens_is_refused():
    with pytest.raises(ValueError, match="1 token or more, found 0"):
        tiled(lambda x: x, torch.zeros(1, 4, 2), 0, [])


class Bent(torch.nn.Module):
    """A module in another's place, as adapters are, with more to it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(2 * self.inner(x))


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp"])
def test_modules_that_were_replaced_are_computed(place):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES["llama"], dtype=torch.float64, attn_implementation="ultralong")
    for layer in model.model.layers:
        parent, _, name = place.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, name, Bent(getattr(owner, name)))
    _, expected = gradients(model, None, 0)
    _, found = gradients(model, None, 16, attention_outputs_on_gpu=3, checkpoint_every=2)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name
