"""Operations of a layer's own passes that touch memory less often than modules do.

Legend: B batch, t tokens of a tile, d hidden size, H heads, D head size.

At a million tokens what is neither attention nor a matrix product still reads and writes 1.5 TB for each layer of
Llama-3.1-8B: a norm in transformers' words is ten operations on a copy twice as wide, and recomputing a layer computes
results that no gradient looks at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ultralong.training.tiled import autocast_now


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


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, t, H, D) turned by their positions' angles, as transformers does: the second half beside the first.

    With the opposite sign of `sin` it is the turn back, which is the gradient's way: cos and sin (1 or B, t, D) hold
    each angle twice, once for each half.
    """
    cos, sin, half = cos.unsqueeze(2), sin.unsqueeze(2), x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        return dy @ weight, rows.T @ x.flatten(0, -2), rows.sum(0) if ctx.biased else None


def unseen(project: nn.Module, x: Tensor) -> Tensor:
    """A projection whose gradients are wanted and whose result nothing looks at: no product is computed.

    Args:
        project: A linear module; another kind is called.
        x: (B, t, d).

    Returns:
        A tensor of the result's shape and type, of zeros, with the result's place in the graph.
    """
    if type(project) is not nn.Linear or project._forward_hooks or project._forward_pre_hooks:
        return project(x)
    narrow, tensors = autocast_now(x), (x, project.weight, project.bias)
    if narrow is not None:
        tensors = tuple(None if tensor is None else tensor.to(narrow) for tensor in tensors)
    return _Unseen.apply(*tensors)
