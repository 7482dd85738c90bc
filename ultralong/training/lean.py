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
from torch.nn import functional

from ultralong.training.one_pass import OnePass
from ultralong.training.tiled import autocast_now

GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # down(act(gate(x)) * up(x))


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
    cos, sin, half = cos.unsqueeze(2), sin.unsqueeze(2), x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _turned_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(2) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(2)


_turn = OnePass(_turned, _turned_at_once)


@torch.library.custom_op("ultralong::rotated", mutates_args=())
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, cos, sin)


@_rotated.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, t, H, D) turned by their positions' angles, as transformers does: the second half beside the first.

    With the opposite sign of `sin` it is the turn back, which is the gradient's way: cos and sin (1 or B, t, D) hold
    each angle twice, once for each half. It has no gradient of its own.
    """
    return _rotated(x, cos, sin)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _gate_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    active = functional.silu(gate)
    return active * up, torch.ops.aten.silu_backward(dy * up, gate), dy * active


_gate_at_once, _gate_backward_at_once = OnePass(_gate), OnePass(_gate_backward)


@torch.library.custom_op("ultralong::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return _gate_at_once(gate, up)


@_gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("ultralong::gated_backward", mutates_args=())
def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up once more, and the gradients of gate and up."""
    return _gate_backward_at_once(dy, gate, up)


@_gated_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(up)


def fed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """A gated feed-forward module's result (.., d) of x (.., d), without a gradient."""
    if not _is_plain(mlp):
        return mlp(x)
    return mlp.down_proj(_gated(mlp.gate_proj(x), mlp.up_proj(x)))


def fed_forward_again(mlp: nn.Module, x: Tensor) -> Tensor:
    """The same for its gradients: the result itself, and what goes into its last product, are not computed."""
    if type(mlp).__name__ not in GATED or "forward" in vars(mlp):
        return mlp(x)
    if not _is_plain(mlp):
        return unseen(mlp.down_proj, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    narrow, weight = autocast_now(x), mlp.down_proj.weight
    return _Down.apply(mlp.gate_proj(x), mlp.up_proj(x), weight if narrow is None else weight.to(narrow))


def _is_plain(mlp: nn.Module) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)), and nothing listens to its last product."""
    return (type(mlp).__name__ in GATED and "forward" not in vars(mlp) and _is_linear(mlp.down_proj)
            and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and mlp.down_proj.bias is None)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return gate.new_zeros(()).expand(*gate.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        active, to_gate, to_up = _gated_backward(dy @ weight, gate, up)
        return to_gate, to_up, dy.flatten(0, -2).T @ active.flatten(0, -2)


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
    if not _is_linear(project):
        return project(x)
    narrow, tensors = autocast_now(x), (x, project.weight, project.bias)
    if narrow is not None:
        tensors = tuple(None if tensor is None else tensor.to(narrow) for tensor in tensors)
    return _Unseen.apply(*tensors)


def _is_linear(project: nn.Module) -> bool:
    """Whether a module is a plain product, and nothing listens to it."""
    return type(project) is nn.Linear and not project._forward_hooks and not project._forward_pre_hooks
