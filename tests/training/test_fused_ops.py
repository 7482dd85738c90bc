"""Norms, gates and rotations in one pass, products without a result: the gradients are those of the usual way."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from ultralong.attention import lse_merge as merge
from ultralong.training.memory import fused_ops, logits
from ultralong.training.memory.fused_ops import (
    add_linear,
    add_mlp,
    apply_rotary,
    linear_add,
    linears_for_backward,
    mlp_for_backward,
    rms_norm,
)
from ultralong.utils.compiled import CheckedCompile


def test_the_norms_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, weight: fused_ops._rms_norm_op(x, weight, 1e-5)[0], (x, weight))
    torch.testing.assert_close(fused_ops._rms_norm_op(x, weight, 1e-5)[0], functional.rms_norm(x, (6,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_as_exact_as_transformers(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(512).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    x, dy = (torch.randn(2, 40, 512).to(dtype) for _ in range(2))
    found = {}
    for name, way in (("theirs", norm), ("ours", lambda x: rms_norm(norm, x))):
        leaf = x.clone().requires_grad_()
        y = way(leaf)
        found[name] = [y, *torch.autograd.grad(y, [leaf, norm.weight], dy)]
    leaf, weight = (x.double().requires_grad_(), norm.weight.detach().double().requires_grad_())
    y = functional.rms_norm(leaf, (512,), weight, norm.variance_epsilon)
    for ours, theirs, exact in zip(
        found["ours"], found["theirs"], [y, *torch.autograd.grad(y, [leaf, weight], dy.double())], strict=True
    ):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm() + 1e-7 * exact.norm()


def test_a_norm_of_another_kind_or_type_is_the_modules_own():
    x = torch.randn(3, 8)
    layer_norm, rms = nn.LayerNorm(8), LlamaRMSNorm(8)
    assert torch.equal(rms_norm(layer_norm, x), layer_norm(x))
    assert torch.equal(rms_norm(rms, x.double()), rms(x.double()))
    rms.forward = lambda x: x + 1
    assert torch.equal(rms_norm(rms, x), x + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_turned_as_transformers_turns_them_and_back_as_its_gradient(dtype):
    torch.manual_seed(0)
    angles = (torch.randn(1, 7, 6, dtype=torch.float64) * 3).repeat(1, 1, 2)  # each once for each half
    cos, sin = (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype)  # YaRN's attention factor is in both
    q = torch.randn(2, 7, 4, 12, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(q)
    theirs = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)[0]
    (dq,) = torch.autograd.grad(theirs, [q], dy)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(apply_rotary(q, cos, sin), theirs, **tolerance)
    torch.testing.assert_close(apply_rotary(dy, cos, -sin), dq, **tolerance)


@pytest.mark.parametrize("seen", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_products_that_nobody_reads_have_the_gradients_of_those_that_are_read(seen, bias, narrow):
    torch.manual_seed(0)
    projects, x = [nn.Linear(6, size, bias=bias) for size in (5, 3, 4)], torch.randn(2, 3, 6, requires_grad=True)
    grads, found = [torch.randn(2, 3, size) for size in (5, 3, 4)], []
    tensors = [x, *(parameter for project in projects for parameter in project.parameters())]
    with torch.autocast("cpu", narrow, narrow is not None):
        for way in (lambda: [project(x) for project in projects], lambda: linears_for_backward(projects, x, seen)):
            results = way()
            found.append([*torch.autograd.grad(results, tensors, [dy.to(results[0].dtype) for dy in grads]), results])
    *expected, right = found[0]
    *ours, results = found[1]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if narrow is None else 2e-2, atol=1e-6 if narrow is None else 2e-2)
    for wanted, result, there in zip(seen, results, right, strict=True):
        assert torch.equal(result, there if wanted else torch.zeros_like(there))


def test_frozen_weights_get_no_gradient():
    projects, x = [nn.Linear(6, 5), nn.Linear(6, 4)], torch.randn(3, 6, requires_grad=True)
    projects[0].requires_grad_(False)
    first, second = linears_for_backward(projects, x, (False, True))
    (first.sum() + second.sum()).backward()
    assert projects[0].weight.grad is None
    assert projects[0].bias.grad is None
    torch.testing.assert_close(projects[1].weight.grad, x.detach().sum(0).expand(4, 6))
    torch.testing.assert_close(x.grad, sum(project.weight.sum(0) for project in projects).expand(3, 6))


def test_a_module_with_more_in_it_than_a_product_is_called():
    x = torch.randn(2, 3, 6)
    hooked, low_rank = nn.Linear(6, 5, bias=False), nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 5))
    hooked.register_forward_hook(lambda module, given, result: result + 1)
    for module in (hooked, low_rank):
        assert torch.equal(linears_for_backward([module], x, [False])[0], module(x))
        onto = torch.randn(2, 3, 5)
        assert torch.equal(linear_add(onto, module, x), onto + module(x))
        total = onto.clone()
        add_linear(total, module, x)
        assert torch.equal(total, onto + module(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_product_is_added_in_place_and_with_gradients(dtype):
    torch.manual_seed(0)
    project = nn.Linear(6, 5, bias=False).to(dtype)
    row, y = torch.randn(2, 9, 5, dtype=dtype), torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    x, dy = row[:, 3:7].clone().requires_grad_(), torch.randn(2, 4, 5, dtype=dtype)
    right, found = x + project(y), linear_add(x, project, y)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, right, **tolerance)
    tensors = [x, y, project.weight]
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, dy), torch.autograd.grad(right, tensors, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)
    before = row.clone()
    with torch.no_grad():
        add_linear(row[:, 3:7], project, y)
    torch.testing.assert_close(row[:, 3:7], right, **tolerance)
    assert torch.equal(row[:, :3], before[:, :3])
    assert torch.equal(row[:, 7:], before[:, 7:])


@pytest.mark.parametrize(
    ("activation", "narrow", "bias"),
    [("silu", None, False), ("silu", torch.bfloat16, False), ("silu", None, True), ("gelu", None, False)],
)
def test_a_feed_forward_layer_has_transformers_result_and_gradients(activation, narrow, bias):
    torch.manual_seed(0)
    mlp = LlamaMLP(
        LlamaConfig(hidden_size=6, num_attention_heads=2, intermediate_size=10, hidden_act=activation, mlp_bias=bias)
    )
    dtype = torch.float64 if narrow is None else torch.float32  # autocast leaves float64 alone
    mlp, x, dy = mlp.to(dtype), torch.randn(2, 7, 6, dtype=dtype, requires_grad=True), torch.randn(2, 7, 6, dtype=dtype)
    tensors, found = [x, *mlp.parameters()], []
    with torch.autocast("cpu", narrow, narrow is not None):
        for way in (mlp, lambda x: mlp_for_backward(mlp, x)):
            y = way(x)
            found.append(torch.autograd.grad(y, tensors, dy.to(y.dtype)))
        with torch.no_grad():
            total = torch.ones_like(x)
            add_mlp(total, mlp, x)
            torch.testing.assert_close(total, torch.ones_like(x) + mlp(x), rtol=1e-13, atol=1e-13)
    limit = 1e-13 if narrow is None else 2e-2
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=limit, atol=limit)
    assert activation == "gelu" or bias or not mlp_for_backward(mlp, x).any(), "no product is computed for nothing"


def test_a_gate_that_somebody_listens_to_is_the_modules_own():
    mlp, x = LlamaMLP(LlamaConfig(hidden_size=6, num_attention_heads=2, intermediate_size=10)), torch.randn(2, 7, 6)
    mlp.down_proj.register_forward_hook(lambda module, given, result: result + 1)
    total = torch.zeros(2, 7, 6)
    with torch.no_grad():
        add_mlp(total, mlp, x)
    assert torch.equal(total, mlp(x))
    assert torch.equal(mlp_for_backward(mlp, x), mlp(x))


def rows(count, *sizes):
    return [torch.randn(count, *size, dtype=torch.float64) for size in sizes]


EACH = {
    "turn": (fused_ops._rotary_compiled, lambda count: rows(count, (4, 8), (8,), (8,))),
    "join": (merge._lerp_compiled, lambda count: rows(count, (4, 8), (4, 8), (4,))),
    "gate": (fused_ops._swiglu_compiled, lambda count: rows(count, (10,), (10,))),
    "gate, back": (fused_ops._swiglu_backward_compiled, lambda count: rows(count, (10,), (10,), (10,))),
    "normalise": (logits.normalise, lambda count: rows(count, (300,))),
    "normalise a padded head's": (
        logits.normalise,
        lambda count: [functional.pad(*rows(count, (294,)), (0, 2), value=-torch.inf)],
    ),
    "loss, back": (
        logits.by_logits,
        lambda count: [*rows(count, (300,), (1,)), torch.randint(300, (count, 1)), torch.float64],
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_what_is_compiled_gives_what_the_function_gives(name, caplog):
    """By torch's tracer, in the words that are compiled; the kernels themselves are set beside it on each GPU."""
    way, made = EACH[name]
    torch.manual_seed(0)
    fast = way.compile_checked(*made(9), backend="aot_eager")
    assert fast is not way._function
    assert not [record for record in caplog.records if record.name.startswith("ultralong")]
    with torch.compiler.set_stance("fail_on_recompile"):  # what was made serves any number of rows
        for count in (2, 23, 1025):
            arguments = made(count)
            found = fast(*arguments)
            torch.testing.assert_close(found, way._function(*arguments), rtol=1e-13, atol=1e-13)


def test_each_size_of_a_row_has_a_function_of_its_own():
    """torch compiles one function for eight sizes at most, and then no more."""

    def double(x):
        return 2 * x

    way = CheckedCompile(double)
    for size in range(1, 21):
        way._fast[size] = way.compile_checked(torch.ones(4, size), backend="aot_eager")
        assert way._fast[size] is not double
        assert torch.equal(way._fast[size](torch.ones(7, size)), torch.full((7, size), 2.0))


def rows_doubled(x):
    return 2 * x


def test_a_gpu_that_is_full_is_no_fault_of_the_compilers(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    with pytest.raises(torch.OutOfMemoryError):
        CheckedCompile(rows_doubled).compile_checked(torch.ones(3, 4))


def not_to_be_compiled(x):
    torch._dynamo.graph_break()
    return x + 1


@pytest.mark.parametrize(
    ("compiled", "said"), [(lambda x: x + 1.01, "gives other results"), (not_to_be_compiled, "could not be compiled")]
)
def test_what_compiles_wrongly_or_not_at_all_runs_as_it_is_written(compiled, said, caplog):
    def plus_one(x):
        return x + 1

    with caplog.at_level(logging.WARNING):
        assert CheckedCompile(plus_one, compiled).compile_checked(torch.ones(3, 4), backend="aot_eager") is plus_one
    assert "plus_one" in caplog.text
    assert said in caplog.text
