"""Fused operations of the custom decoder layers: RMS norm, rotary embedding, linear, SwiGLU feed-forward.

Legend: B batch, t tokens of a tile, N = B t, d hidden size, I intermediate size, H heads, D head size.

At a million tokens what is neither attention nor a matrix product still reads and writes 1.5 TB for each layer of
Llama-3.1-8B: a norm in transformers' code is ten operations on a copy twice as wide, and recomputing a layer computes
results that no gradient looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultralong.training.memory.tiled import autocast_now
from ultralong.utils.compiled import CheckedCompile

GATED_MLPS = ("LlamaMLP", "MistralMLP", "MinistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP")
SILU = ("SiLU", "SiLUActivation")


@torch.library.custom_op("ultralong::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Each x over the root of its mean square, times weight, and the factor (.., 1): one pass on a GPU."""
    if x.is_cuda:
        y, factor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, epsilon)
        return y, factor
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * factor * weight).to(x.dtype), factor


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("ultralong::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    if x.is_cuda:
        dx, dw = torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], factor, weight, [True, True])
        return dx, dw
    unit = x.to(factor.dtype) * factor
    d_unit = dy.to(factor.dtype) * weight
    dx = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * factor
    return dx.to(x.dtype), (dy * unit).flatten(0, -2).sum(0).to(weight.dtype)


@_rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward_op(dy.contiguous(), *ctx.saved_tensors), None


_rms_norm_op.register_autograd(_norm_backward, setup_context=_save_for_norm)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMS norm of x (.., d), in one pass and rounded once; of another kind of norm what the module computes.

    transformers rounds to x's type before it multiplies with the weight and after it; torch's fused kernel, which is
    what runs on a GPU, after it only. Float64 goes to the module, which computes its norm in float32.
    """
    norm = _in_use(norm)
    epsilon: float | None = getattr(norm, "variance_epsilon", None)
    weight: Any = getattr(norm, "weight", None)
    plain = type(norm).__name__.endswith("RMSNorm") and "forward" not in vars(norm)
    if not plain or epsilon is None or x.dtype == torch.float64 or weight.dtype != x.dtype:
        return norm(x)
    return _rms_norm_op(x.contiguous(), weight, epsilon)[0]


def _in_use(module: Any) -> nn.Module:
    """The module that computes: where peft trains one whole it holds copies beside the original, one of them active."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or "forward" in vars(module):
        return module
    active = [] if module.disable_adapters else module.active_adapters
    return copies[active[0]] if active and active[0] in copies else module.original_module


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _rotary_compilable(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)


_rotary_compiled = CheckedCompile(_rotary, _rotary_compilable)


@torch.library.custom_op("ultralong::rotary", mutates_args=())
def _rotary_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = (y.expand(x.shape[0], -1, -1).flatten(0, 1) for y in (cos, sin))
    return _rotary_compiled(x.flatten(0, 1), *angles).view(x.shape)


@_rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads (B, t, H, D), as transformers does: the second half of a head beside the first.

    cos and sin (1 or B, t, D) hold each angle twice, once for each half. With the opposite sign of `sin` it is the
    inverse rotation, which takes gradients back. It has no gradient of its own.
    """
    return _rotary_op(x, cos, sin)


def is_plain_linear(project: Any) -> bool:
    """Whether a module is a plain linear layer without hooks."""
    return type(project) is nn.Linear and not project._forward_hooks and not project._forward_pre_hooks


class _Linears(torch.autograd.Function):
    """Linear projections of one input, whose gradient is summed by the matrix products that compute it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, needed: tuple[bool, ...], *parameters: Any) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(needed)], parameters[len(needed) :]
        ctx.save_for_backward(x, *weights)
        return tuple(
            functional.linear(x, weight, bias) if wanted else x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
            for wanted, weight, bias in zip(needed, weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, wanted = [grad.flatten(0, -2) for grad in grads], ctx.needs_input_grad[2:]
        of_weights = [row.T @ x.flatten(0, -2) if want else None for row, want in zip(rows, wanted, strict=False)]
        of_biases = [row.sum(0) if want else None for row, want in zip(rows, wanted[len(rows) :], strict=True)]
        return sum_of_matmuls(rows, weights).view(x.shape), None, *of_weights, *of_biases


def sum_of_matmuls(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum (N, d) of rows (N, e) times weights (e, d), each product added by the next one."""
    total = rows[0] @ weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        torch.addmm(total, row, weight, out=total)
    return total


def linears_for_backward(projects: Sequence[Any], x: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    """Projections of one x (B, t, d) for their gradients; results that nothing looks at are not computed.

    Args:
        projects: Linear modules; modules of another kind are called.
        x: (B, t, d).
        needed: Which results are looked at; the others' products are not computed.

    Returns:
        For each a tensor of the result's shape and type, with its place in the graph; of zeros where it is not needed.
    """
    if not all(map(is_plain_linear, projects)):
        return [project(x) for project in projects]
    dtype = autocast_now(x)
    parameters = [*(project.weight for project in projects), *(project.bias for project in projects)]
    if dtype is not None:
        x, parameters = x.to(dtype), [None if y is None else y.to(dtype) for y in parameters]
    return list(_Linears.apply(x, tuple(needed), *parameters))


def linear_add(x: Tensor, project: Any, y: Tensor) -> Tensor:
    """Compute x + project(y), for x (B, t, d) and y (B, t, e), rounded once where one operation can do both."""
    if not _fuses_add(x, project, y):
        return x + project(y)
    # Row by row as `add_linear` does, so that both round alike: a mixture's router must choose the same experts again.
    return torch.stack([torch.addmm(total, rows, project.weight.T) for total, rows in zip(x, y, strict=True)])


def add_linear(x: Tensor, project: Any, y: Tensor) -> None:
    """Add project(y) to x in place, for x that is a part of a row (or of rows) and needs no gradient."""
    if not _fuses_add(x, project, y):
        x += project(y)
        return
    for total, rows in zip(x, y, strict=True):
        torch.addmm(total, rows, project.weight.T, out=total)


def _fuses_add(x: Tensor, project: Any, y: Tensor) -> bool:
    """Whether one operation can add a product to x, in x's type as the usual two would."""
    return (
        is_plain_linear(project)
        and project.bias is None
        and x.dtype == y.dtype == project.weight.dtype
        and autocast_now(x) in (None, x.dtype)
    )


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    active = functional.silu(gate)
    return active * up, torch.ops.aten.silu_backward(dy * up, gate), dy * active


_swiglu_compiled, _swiglu_backward_compiled = CheckedCompile(_swiglu), CheckedCompile(_swiglu_backward)


@torch.library.custom_op("ultralong::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, I) each."""
    return _swiglu_compiled(gate, up)


@_swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("ultralong::swiglu_backward", mutates_args=())
def _swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up again, and the gradients of gate and up, (N, I) each."""
    return _swiglu_backward_compiled(dy, gate, up)


@_swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(up)


def mlp_output(mlp: Any, x: Tensor) -> Tensor:
    """mlp(x) (B, t, d); gpt-oss gives its router's scores beside it."""
    found = mlp(x)
    return found[0] if isinstance(found, tuple) else found


def add_mlp(x: Tensor, mlp: Any, y: Tensor) -> None:
    """Add mlp(y) to x in place, for x and y (B, t, d) without gradients."""
    if not _is_plain_swiglu(mlp):
        x += mlp_output(mlp, y)
        return
    gate, up = mlp.gate_proj(y), mlp.up_proj(y)
    add_linear(x, mlp.down_proj, _swiglu_op(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))


def mlp_for_backward(mlp: Any, x: Tensor) -> Tensor:
    """mlp(x) (B, t, d) for its gradients: the result itself, of zeros here, is not computed."""
    if type(mlp).__name__ not in GATED_MLPS or "forward" in vars(mlp):
        return mlp_output(mlp, x)
    if not _is_plain_swiglu(mlp):
        gate, up = linears_for_backward((mlp.gate_proj, mlp.up_proj), x, (True, True))
        return linears_for_backward([mlp.down_proj], mlp.act_fn(gate) * up, [False])[0]
    dtype, tensors = autocast_now(x), [x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    return _SwiGLU.apply(*(tensors if dtype is None else [y.to(dtype) for y in tensors]))


def _is_plain_swiglu(mlp: Any) -> bool:
    """Whether a module is SwiGLU of three plain linear layers without biases."""
    parts: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        type(mlp).__name__ in GATED_MLPS
        and "forward" not in vars(mlp)
        and type(mlp.act_fn).__name__ in SILU
        and all(is_plain_linear(part) and part.bias is None for part in parts)
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        made = [functional.linear(x, weight).flatten(0, -2) for weight in (gate, up)]
        ctx.save_for_backward(x, gate, up, down, *made)
        return x.new_zeros(()).expand(*x.shape[:-1], down.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, gate, up = ctx.saved_tensors
        rows, dy = x.flatten(0, -2), dy.flatten(0, -2)
        active, *grads = _swiglu_backward_op(dy @ weights[2], gate, up)
        pairs = (grads[0], rows), (grads[1], rows), (dy, active)
        of_weights = [a.T @ b if want else None for (a, b), want in zip(pairs, ctx.needs_input_grad[1:], strict=True)]
        return sum_of_matmuls(grads, weights[:2]).view(x.shape), *of_weights
