"""What the planner traces on fake tensors, against the same on real ones, in as many processes as there are ranks."""

from dataclasses import astuple, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ultralong.attention import NAME, make_attention_context
from ultralong.planner.traces import attention as traces
from ultralong.planner.traces import child, shape_tensors
from ultralong.planner.traces import tracker as tracker_module
from ultralong.planner.traces.attention import AttentionWorkload, between, trace_attention
from ultralong.planner.traces.fake_loss import fake_head_loss
from ultralong.planner.traces.kernel import KERNELS, AllocatingKernel, planned_kernel
from ultralong.planner.traces.layers import StepSettings, trace_layers, trace_step, traced
from ultralong.planner.traces.shape_tensors import ShapeMode
from ultralong.planner.traces.tracker import Tracker
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import add_adapters
from ultralong.training.config import MemoryConfig
from ultralong.training.loss import tiled_cross_entropy
from ultralong.training.memory.activation_memory import ActivationMemory
from ultralong.utils.local_ranks import run_ranks

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("fake", [False, True])
def test_the_tracker_counts_storages_work_and_traffic(fake):
    mode = ShapeMode() if fake else torch.no_grad()
    with mode, Tracker() as tracker:
        a = torch.ones(1000, 1000)  # 4 MB written
        b = a @ a  # two GFLOP
        view = a.t()[:10]
        assert (tracker.live, tracker.peak) == (8_000_000, 8_000_000)
        del a
        assert tracker.live == 8_000_000, "a view keeps its storage"
        del view
        assert tracker.live == 4_000_000
        tracker.moment = "later"
        b.add_(1.0)  # 4 MB read, 4 MB written, nothing made
        c = b + b[:1]  # 4 MB and 4 kB read, 4 MB written
        assert (tracker.live, tracker.peak) == (8_000_000, 8_000_000)
    assert tracker.multiplied == 2 * 1000**3
    assert tracker.moved == 4_000_000 + 8_000_000 + 8_004_000
    assert tracker.operations == 4
    assert dict(tracker.peaks) == {"": 8_000_000, "later": 8_000_000}
    assert c.shape == (1000, 1000)


@pytest.mark.parametrize("fake", [False, True])
def test_operations_on_tensors_of_different_layouts_are_counted_by_elements(fake):
    """A GPU takes several elements at a time only where all tensors lie in memory alike and without gaps."""
    with ShapeMode() if fake else torch.no_grad(), Tracker() as tracker:
        x, factor, mask = torch.ones(40, 60), torch.ones(40, 1), torch.zeros(40, 1, dtype=torch.bool)
        x * x, x + 1.0, x.t() * x.t(), x[:20] * x[20:], x.clone()
        assert (tracker.strided, tracker.strided_moved) == (0, 0)
        x * factor  # 9600 bytes read and written each, and the factors
        assert (tracker.strided, tracker.strided_moved) == (2400, 2 * 9600 + 160)
        x[:, :30] * x[:, 30:], x * x.reshape(60, 40).t()
        assert tracker.strided == 2400 + 1200 + 2400
        moved, operations = tracker.moved, tracker.operations
        x.masked_fill(mask, 0.0)  # a copy, and filled in place
        assert tracker.strided == 2400 + 1200 + 2 * 2400
        assert tracker.moved - moved == 2 * 9600 + 2 * 9600 + 40
        assert tracker.operations - operations == 2


# ---- Layers.


def tiny_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(TINY, dtype=torch.float32, attn_implementation=NAME).train()


@pytest.mark.parametrize("layer_tile", [None, 0, 64], ids=["all stored", "checkpointed", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_fake_tensors_takes_what_it_takes_on_real_ones(layer_tile, dtype):
    checkpointed = layer_tile is not None
    settings = StepSettings(2, dtype, checkpointed, loss_tile=64, layer_tile=layer_tile or 0)
    real = trace_step(tiny_model(), torch.zeros(2, 256, dtype=torch.int64), settings)
    fake = traced(TINY.to_json_string(use_diff=False), 256, settings, TINY.num_hidden_layers)
    assert fake == real
    assert bool(fake.at_recompute) == checkpointed


@pytest.mark.parametrize("layer_tile", [pytest.param(0, marks=pytest.mark.soak), 64], ids=["checkpointed", "tiled"])
def test_a_step_with_adapters_on_fake_tensors_takes_what_it_takes_on_real_ones(layer_tile):
    lora = LoRAConfig(rank=4, targets=("q_proj", "down_proj"), train_norms=True)
    settings = StepSettings(1, torch.bfloat16, True, loss_tile=64, layer_tile=layer_tile, lora=lora)
    real = trace_step(add_adapters(tiny_model(), lora).train(), torch.zeros(1, 256, dtype=torch.int64), settings)
    fake = traced(TINY.to_json_string(use_diff=False), 256, settings, TINY.num_hidden_layers)
    for name in ("forward", "at_attention", "loss", "backward", "recomputed", "at_backward", "multiplied"):
        assert getattr(fake, name) == pytest.approx(getattr(real, name), rel=0.01), name
    whole = traced(TINY.to_json_string(use_diff=False), 256, replace(settings, lora=LoRAConfig()), 3)
    assert fake.loss < whole.loss, "a frozen head has no gradient"
    assert fake.multiplied < whole.multiplied, "nor have the frozen weights"


def test_results_that_are_kept_by_their_shapes_change_no_trace(monkeypatch):
    """A step with every layout worked out anew, one that fills the store, and one that takes all from it."""
    settings = StepSettings(activation_checkpointing=True, loss_tile=16, layer_tile=32)

    def trace():
        return traced.__wrapped__(TINY.to_json_string(use_diff=False), 96, settings, 2)

    with monkeypatch.context() as patch:
        patch.setattr(shape_tensors, "_key", lambda *_: None)
        patch.setattr(shape_tensors, "_results", {})
        anew = trace()
        assert not shape_tensors._results
    monkeypatch.setattr(shape_tensors, "_results", kept := {})
    assert trace() == anew
    filled = dict(kept)
    assert len(filled) > 20
    assert trace() == anew
    assert kept == filled
    with shape_tensors.ShapeMode():
        x = torch.ones(4, 6)
        whole, same, other = x * 2, x * 2, x.double() * 2
        assert whole.untyped_storage()._cdata != same.untyped_storage()._cdata, "each result has memory of its own"
        assert (whole.dtype, other.dtype, (x > 1).dtype) == (torch.float32, torch.float64, torch.bool)
        numbers = torch.ones(3, dtype=torch.int64)
        assert [(numbers * 2).dtype, (numbers * 2.0).dtype, (numbers * True).dtype] == [
            torch.int64, torch.float32, torch.int64
        ]  # fmt: skip
        assert (x.t() * 2).stride() == (1, 6)


@pytest.mark.parametrize("vocabulary", [8192, 8190], ids=["whole", "padded"])
def test_the_fake_loss_holds_as_much_as_the_loss(vocabulary):
    peaks = []
    for loss in (
        lambda *x: tiled_cross_entropy(x[0], x[1], torch.ones(1024, dtype=torch.int64), 256)[0],
        lambda *x: fake_head_loss(x[0], x[1], 256, torch.float32),
    ):
        hidden = torch.randn(1024, 64, requires_grad=True)
        weight = torch.randn(vocabulary, 64, requires_grad=True)
        with Tracker() as tracker:
            loss(hidden, weight).backward()
        peaks.append(tracker.peak)
    tile = 256 * 8192 * 4
    assert peaks[0] <= peaks[1] <= peaks[0] + 1.1 * tile  # in float32 a CPU's softmax is its gradient: no second tile


def test_recomputation_trades_memory_for_products():
    stored, again = (
        trace_layers(TINY, 4096, StepSettings(activation_checkpointing=choice, loss_tile=64))
        for choice in (False, True)
    )
    assert again.in_backward(0, 0) < stored.in_backward(0, 0) / 2
    # A fourth pass through the layers beside three.
    assert stored.multiplied < again.multiplied <= stored.multiplied * 4 / 3


@pytest.mark.parametrize("layer_tile", [0, 64])
def test_few_layers_and_tiles_stand_for_many(layer_tile):
    """5 layers by 1 and 2, and 5 tiles by 2 and 3: that gives what tracing all of them gives."""
    shape = LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": 5})
    settings = StepSettings(activation_checkpointing=True, layer_tile=layer_tile, loss_tile=64, sharded=True)
    short = trace_layers(shape, 320, settings)
    whole = traced(shape.to_json_string(use_diff=False), 320, settings, 5)
    assert astuple(short) == pytest.approx(astuple(whole), rel=0.01)
    assert (short.multiplied, short.operations) == pytest.approx((whole.multiplied, whole.operations), rel=1e-4)


# ---- Attention.


DOCUMENTS = (0, 60, 75, 190, 230, 256)
EVEN = (0, 64, 128, 192, 256)


def workload(scheme: str, world: int, heads: tuple[int, int] = (8, 4), **changes) -> AttentionWorkload:
    two = scheme.startswith("hybrid")
    values = {
        "tokens": 256,
        "boundaries": None,
        "rows": 1,
        "heads": heads[0],
        "kv_heads": heads[1],
        "head_dim": 8,
        "dtype": "bfloat16",
        "scheme": scheme,
        "kernel": "flash4",
        "outer": 2 if two else world,
        "inner": world // 2 if two else 1,
    }
    return AttentionWorkload(**(values | changes))


def real_peaks(rank: int, world: int, asked: AttentionWorkload) -> tuple[int, list[int]]:
    """This rank's peaks of both passes in real processes: the least of some runs, as gloo may hold a buffer longer."""
    group = dist.group.WORLD
    if asked.inner > 1:
        meshes = [[dist.new_group([m + asked.inner * h for h in range(2)]) for m in range(asked.inner)]]
        meshes.append([dist.new_group([asked.inner * h + m for m in range(asked.inner)]) for h in range(2)])
        group = (meshes[0][rank % asked.inner], meshes[1][rank // asked.inner])
    kernel = AllocatingKernel(asked.kernel)
    context = traces._context(asked, group, kernel)
    shape = (asked.rows, context.local_tokens)
    q, k, v, dout = (
        torch.zeros(*shape, n, asked.head_dim, dtype=torch.bfloat16)
        for n in (asked.heads, asked.kv_heads, asked.kv_heads, asked.heads)
    )
    scheme, spec = context.scheme_and_spec(q, k, v)
    peaks = []
    for _ in range(5):
        with Tracker() as tracker:
            out, lse = scheme.forward(q, k, v, spec)
            forward = tracker.peak
        with Tracker() as tracker:
            scheme.backward(dout, q, k, v, out, lse, spec)
            peaks.append((forward, tracker.peak))
    return traces._most_keys(context), [min(each) for each in zip(*peaks)]


def test_attention_of_grouped_queries_counts_all_query_heads(monkeypatch):
    """As PyTorch before 2.12 counts: it asserts that there are as many kv heads as query heads."""

    def count(query, key, value, *args, out_val=None, **kwargs):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        return 4 * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]

    flash = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setitem(tracker_module.flop_registry, flash, count)
    with FakeTensorMode(), Tracker() as tracker:
        q, k, v = (torch.empty(1, heads, 64, 16, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        flash(q, k, v)
    assert tracker.multiplied == 4 * 8 * 64 * 64 * 16


CASES = {
    "Ulysses": workload("ulysses", 2),
    "Ulysses, chunks of kv heads": workload("ulysses", 2, head_chunks=2),
    "Ulysses, chunks of a kv head": workload("ulysses", 2, (8, 2), head_chunks=4),
    "Ulysses, repeated kv heads": workload("ulysses", 2, (8, 1)),
    "gathered": workload("gathered", 2, (9, 3)),
    "gathered, four ranks, rounds": workload("gathered", 4, (9, 3), head_chunks=3),
    "gathered, documents": workload("gathered", 2, boundaries=DOCUMENTS),
    "ring": workload("ring", 2),
    "ring, four ranks": workload("ring", 4, (9, 3)),
    "ring, documents": workload("ring", 2, boundaries=DOCUMENTS),
    "hybrid ring": workload("hybrid-ring", 4),
    "hybrid gathered": workload("hybrid-gathered", 4),
    "hybrid gathered, documents": workload("hybrid-gathered", 4, boundaries=DOCUMENTS),
    "rows of two": workload("ulysses", 2, rows=2),
    "cuDNN's calls": workload("gathered", 2, kernel="cudnn"),
    "whole documents on each rank": workload("auto", 2, boundaries=EVEN),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_on_a_fake_group_holds_what_it_holds_in_real_processes(name):
    asked = CASES[name]
    found = child.attention_trace(asked)
    busiest, _ = (ranks := run_ranks(real_peaks, asked.outer * asked.inner, asked))[0]
    assert (found.forward.peak, found.backward.peak) == pytest.approx(ranks[busiest][1], rel=0.03)


def test_what_is_sent_is_counted_from_the_scheme():
    """In bytes: each rank of Ulysses keeps its own half; gathered ranks get the other half of K and V; a ring too.

    The rank that holds the row's last tokens sends half of its K and V only: nobody sees the last quarter of a row.
    """
    token = 8 * 2  # bytes of a head of a token
    local = 128 * token
    found = {scheme: child.attention_trace(workload(scheme, 2)) for scheme in ("ulysses", "gathered", "ring")}
    assert found["ulysses"].forward.transferred == local * (8 + 4 + 4 + 8) / 2  # q, k, v there and out back
    assert found["ulysses"].backward.transferred == local * (3 * 8 + 2 * 4 + 8 + 2 * 4) / 2
    assert found["gathered"].forward.transferred == local * 2 * 4
    assert found["ring"].forward.transferred == local * 2 * 4
    assert found["ring"].backward.transferred == local * 2 * 4 * (0.5 + 2), "its K and V, the others' float32 gradients"
    apart = child.attention_trace(CASES["whole documents on each rank"])
    assert not apart.exchanges
    assert apart.forward.transferred == apart.backward.transferred == 0


def test_one_process_has_the_kernels_buffers_for_a_chunk_of_heads_only():
    """In bytes of a token: gradients of q, k and v, and float32 buffers of as many elements, twice as large."""
    peaks = {
        chunks: trace_attention(workload("auto", 1, tokens=2**14, head_chunks=chunks)).backward.peak / 2**14
        for chunks in (1, 4)
    }
    grads = (8 + 4 + 4) * 8 * 2
    assert peaks[1] == pytest.approx(3 * grads, rel=0.1)
    # Beside a chunk's buffers its gradients, and copies of what it is given: as much again, dout and out.
    assert peaks[4] == pytest.approx(grads + (3 * grads + grads + 2 * 8 * 8 * 2) / 4, rel=0.1)


@pytest.mark.parametrize("scheme", ["ulysses", "gathered", "ring"])
def test_the_work_is_that_of_the_busiest_rank(scheme):
    whole = trace_attention(workload("auto", 1, tokens=1024))
    assert whole.forward.flops == 4 * 1024**2 / 2 * 8 * 8
    assert whole.backward.flops == 2.5 * whole.forward.flops
    shared = child.attention_trace(workload(scheme, 4, tokens=1024, head_chunks=1))
    assert shared.forward.flops == pytest.approx(whole.forward.flops / 4, rel=0.01)
    edges = tuple(512 * edge for edge in DOCUMENTS)
    packed = child.attention_trace(workload(scheme, 2, tokens=edges[-1], boundaries=edges))
    pairs = sum((b - a) ** 2 for a, b in pairwise(edges)) / 2
    assert 1 <= packed.forward.flops / (4 * pairs / 2 * 8 * 8) < 1.02, "documents are assigned evenly"


def test_what_the_trainer_refuses_is_refused_in_the_other_process_too():
    with pytest.raises(ValueError, match=r"Ulysses can't split 9 query and 3 kv heads over 2 ranks"):
        child.attention_trace(workload("ulysses", 2, (9, 3)))
    with pytest.raises(ValueError, match="takes two levels of ranks"):
        child.attention_trace(workload("hybrid-ring", 2, outer=2, inner=1))
    assert child.attention_trace(workload("ring", 2)).scheme == "ring", "the process is there for the next one"


def test_the_other_process_leaves_this_ones_groups_alone_and_may_be_started_again(fresh_child, python, monkeypatch):
    """The first one is an interpreter of its own; the second need not import everything again."""
    child.attention_trace(workload("ring", 3))
    assert not dist.is_initialized()
    before = child.start()
    child.stop()
    assert before.returncode == 0
    monkeypatch.setattr(child, "sys", SimpleNamespace(executable=python))
    assert child.attention_trace(workload("ring", 5)).exchanges
    assert child.start() is not before


def test_between_two_traces_lies_a_straight_line():
    low, high = (trace_attention(workload("auto", 1, tokens=tokens)) for tokens in (512, 1024))
    middle = between(low, high, 0.5)
    assert middle.forward.peak == trace_attention(workload("auto", 1, tokens=768)).forward.peak
    assert between(low, high, 0.0) == replace(low)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_can_be_planned_with(name):
    kernel = AllocatingKernel(name)
    q, k = torch.zeros(1, 16, 4, 8), torch.zeros(1, 16, 2, 8)
    context = make_attention_context(16, kernel=kernel, heads=4, kv_heads=2, boundaries=(0, 6, 16))
    scheme, spec = context.scheme_and_spec(q, k, k)
    out, lse = scheme.forward(q, k, k, spec)
    grads = scheme.backward(out, q, k, k, out, lse, spec)[:3]
    assert (out.shape, lse.shape) == (q.shape, (1, 4, 16))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
    assert kernel.flops_forward == 4 * (36 + 100) / 2 * 4 * 8
    assert planned_kernel(name, packed=True) == name


# ---- Both together.


def loss_of(model, ids, context, settings):
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    places = context.positions()
    hidden = decoder(input_ids=ids, position_ids=places, use_cache=False, attention_context=context).last_hidden_state
    return fake_head_loss(hidden.flatten(0, 1), head, settings.loss_tile, settings.dtype)


def whole_step(rank: int, world: int, scheme: str, settings: StepSettings, stored: int) -> list[int]:
    """Peaks before and in the backward pass of a real step of the tiny model, attention by the real scheme.

    The attention outputs of the last `stored` layers are stored.
    """
    torch.manual_seed(0)
    peaks = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_config(TINY, dtype=settings.dtype, attn_implementation=NAME).train()
        config = MemoryConfig(
            activation_checkpointing=True, layer_tile=settings.layer_tile, attention_outputs_on_gpu=stored
        )
        memory = ActivationMemory(model, config)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        group = dist.group.WORLD if world > 1 else None
        kernel = AllocatingKernel("flash4")
        context = make_attention_context(2048, group, scheme, kernel, heads=4, kv_heads=2, store=memory.attention_store)
        ids = torch.zeros(1, context.local_tokens, dtype=torch.int64)
        with Tracker() as tracker:
            loss = loss_of(model, ids, context, settings)
            before, tracker.peak = tracker.peak, tracker.live
            loss.backward()
            peaks.append((before, tracker.peak))
    return [min(each) for each in zip(*peaks)]


STEPS = {"layers": (0, 0), "tiles": (256, 0), "stored": (256, 3)}  # the layers' tile, and stored attention outputs
TOGETHER = [
    pytest.param(scheme, world, *STEPS[step], id=f"{scheme}-{world}-{step}", marks=[pytest.mark.soak] * again)
    for scheme, world in (("auto", 1), ("ulysses", 2), ("gathered", 2), ("ring", 2))
    for step in STEPS
    for again in [scheme in ("gathered", "ring") and step != "stored"]
]


@pytest.mark.parametrize(("scheme", "world", "layer_tile", "stored"), TOGETHER)
def test_layers_and_attention_together_are_a_step(scheme, world, layer_tile, stored):
    settings = StepSettings(activation_checkpointing=True, loss_tile=16, layer_tile=layer_tile, sharded=True)
    layers = traced(TINY.to_json_string(use_diff=False), 2048 // world, settings, TINY.num_hidden_layers)
    attention = child.attention_trace(workload(scheme, world, (4, 2), tokens=2048, head_dim=TINY.head_dim))
    head = 2048 // world * TINY.head_dim * 2  # bytes of one head
    output, lse = 4 * head, 2048 // world * 4 * 4  # the log-sum-exp is float32
    forward, backward = attention.forward.peak, attention.backward.peak
    before_loss = max(layers.forward, layers.at_attention + forward)  # with its own output, that of the layer at work
    others = max(0, stored - 1) * (output + lse)
    said = (
        max(before_loss + others, layers.loss + stored * (output + lse)),
        layers.in_backward(forward, backward, (4 + 2 * 2) * head if stored else None) + others,
    )
    step = (scheme, settings, stored)
    real = run_ranks(whole_step, world, *step)[0] if world > 1 else whole_step(0, 1, *step)
    assert said == pytest.approx(real, rel=0.03)
