"""Operations of a layer's own passes that touch memory less often than modules do.

Legend: B batch, t tokens of a tile, N = B t, d hidden size, H heads, D head size.

At a million tokens what is neither attention nor a matrix product still reads and writes 1.5 TB for each layer of
Llama-3.1-8B: a norm in transformers' words is ten operations on a copy twice as wide, and recomputing a layer computes
results that no gradient looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultralong.training.tiled import autocast_now
from ultralong.utils.compiled import CheckedCompile


@torch.library.custom_op("ultralong::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Each x over the root of its mean square, times weight, and the factor (.., 1): one pass on a GPU."""
    if x.is_cuda:
        y, factor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, epsilon)
        return y, factor
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * factor * weight).to(x.dtype), factor


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("ultralong::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    if x.is_cuda:
        dx, dw = torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], factor, weight, [True, True])
        return dx, dw
    unit = x.to(factor.dtype) * factor
    d_unit = dy.to(factor.dtype) * weight
    dx = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * factor
    return dx.to(x.dtype), (dy * unit).flatten(0, -2).sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(dy.contiguous(), *ctx.saved_tensors), None


_rms_norm.register_autograd(_norm_backward, setup_context=_keep_for_norm)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's result (.., d) of x (.., d): of an RMS norm in one pass, rounded once, else what the module computes.

    transformers rounds to x's type before it multiplies with the weight and after it; torch's fused kernel, which is
    what runs on a GPU, after it only. Float64 goes to the module, which computes its norm in float32.
    """
    epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
    plain = type(norm).__name__.endswith("RMSNorm") and epsilon is not None and "forward" not in vars(norm)
    if not plain or x.dtype == torch.float64 or weight.dtype != x.dtype:
        return norm(x)
    return _rms_norm(x.contiguous(), weight, epsilon)[0]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _turned_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)


_turn = CheckedCompile(_turned, _turned_at_once)


@torch.library.custom_op("ultralong::rotated", mutates_args=())
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = (y.expand(x.shape[0], -1, -1).flatten(0, 1) for y in (cos, sin))
    return _turn(x.flatten(0, 1), *angles).view(x.shape)


@_rotated.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, t, H, D) turned by their positions' angles, as transformers does: the second half beside the first.

    With the opposite sign of `sin` it is the turn back, which is the gradient's way: cos and sin (1 or B, t, D) hold
    each angle twice, once for each half. It has no gradient of its own.
    """
    return _rotated(x, cos, sin)


def is_product(project: nn.Module) -> bool:
    """Whether a module is a plain matrix product, and nothing listens to it."""
    return type(project) is nn.Linear and not project._forward_hooks and not project._forward_pre_hooks


class _Products(torch.autograd.Function):
    """Products of one input, whose gradient is summed where the products are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: tuple[bool, ...], *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(seen)], parameters[len(seen) :]
        ctx.save_for_backward(x, *weights)
        return tuple(
            functional.linear(x, weight, bias) if wanted else x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
            for wanted, weight, bias in zip(seen, weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, wanted = [grad.flatten(0, -2) for grad in grads], ctx.needs_input_grad[2:]
        of_weights = [row.T @ x.flatten(0, -2) if want else None for row, want in zip(rows, wanted, strict=False)]
        of_biases = [row.sum(0) if want else None for row, want in zip(rows, wanted[len(rows) :], strict=True)]
        return sum_of_products(rows, weights).view(x.shape), None, *of_weights, *of_biases


def sum_of_products(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum (N, d) of rows (N, e) times weights (e, d), each product added to by the next one."""
    total = rows[0] @ weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        torch.addmm(total, row, weight, out=total)
    return total


def products(projects: Sequence[nn.Module], x: Tensor, seen: Sequence[bool]) -> list[Tensor]:
    """Projections of one x (B, t, d) whose gradients are wanted, though of some of them nothing looks at the result.

    Args:
        projects: Linear modules; modules of another kind are called.
        x: (B, t, d).
        seen: Which results are looked at; the others' products are not computed.

    Returns:
        For each a tensor of the result's shape and type, with its place in the graph; of zeros where it is not seen.
    """
    if not all(map(is_product, projects)):
        return [project(x) for project in projects]
    narrow = autocast_now(x)
    parameters = [*(project.weight for project in projects), *(project.bias for project in projects)]
    if narrow is not None:
        x, *parameters = (None if y is None else y.to(narrow) for y in (x, *parameters))
    return list(_Products.apply(x, tuple(seen), *parameters))


def added(x: Tensor, project: nn.Module, y: Tensor) -> Tensor:
    """The sum x + project(y), for x (B, t, d) and y (B, t, e), rounded once where one operation can do both."""
    if not _adds(x, project, y):
        return x + project(y)
    return torch.addmm(x.flatten(0, -2), y.flatten(0, -2), project.weight.T).view(x.shape)


def add_product(x: Tensor, project: nn.Module, y: Tensor) -> None:
    """The same sum in place of x, which is a part of a row (or of rows) and needs no gradient."""
    if not _adds(x, project, y):
        x += project(y)
        return
    for total, rows in zip(x, y, strict=True):
        torch.addmm(total, rows, project.weight.T, out=total)


def _adds(x: Tensor, project: nn.Module, y: Tensor) -> bool:
    """Whether one operation can add a product to x, in x's type as the usual two would."""
    return (
        is_product(project)
        and project.bias is None
        and x.dtype == y.dtype == project.weight.dtype
        and autocast_now(x) in (None, x.dtype)
    )
