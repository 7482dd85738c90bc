"""Gated feed-forward modules, down(silu(gate(x)) * up(x)), with what is not a product in one pass over memory.

Legend: B batch, t tokens of a tile, N = B t, d hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultralong.training.fused_ops import add_product, is_product, products, sum_of_products
from ultralong.training.tiled import autocast_now
from ultralong.utils.compiled import CheckedCompile

GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
SILU = ("SiLU", "SiLUActivation")


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _gate_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    active = functional.silu(gate)
    return active * up, torch.ops.aten.silu_backward(dy * up, gate), dy * active


_gate_at_once, _gate_backward_at_once = CheckedCompile(_gate), CheckedCompile(_gate_backward)


@torch.library.custom_op("ultralong::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, I) each."""
    return _gate_at_once(gate, up)


@_gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("ultralong::gated_backward", mutates_args=())
def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up once more, and the gradients of gate and up, (N, I) each."""
    return _gate_backward_at_once(dy, gate, up)


@_gated_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(up)


def add_fed_forward(x: Tensor, mlp: nn.Module, y: Tensor) -> None:
    """Add mlp(y) to x in place, for x and y (B, t, d) without gradients."""
    if not _is_known(mlp):
        x += mlp(y)
        return
    gate, up = mlp.gate_proj(y), mlp.up_proj(y)
    add_product(x, mlp.down_proj, _gated(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))


def fed_forward_again(mlp: nn.Module, x: Tensor) -> Tensor:
    """mlp(x) (B, t, d) for its gradients: the result, and what goes into its last product, are not computed."""
    if type(mlp).__name__ not in GATED or "forward" in vars(mlp):
        return mlp(x)
    if not _is_known(mlp):
        gate, up = products((mlp.gate_proj, mlp.up_proj), x, (True, True))
        return products([mlp.down_proj], mlp.act_fn(gate) * up, [False])[0]
    narrow, tensors = autocast_now(x), [x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    return _FedForward.apply(*(tensors if narrow is None else [y.to(narrow) for y in tensors]))


def _is_known(mlp: nn.Module) -> bool:
    """Whether a module is of three plain products without biases, and gated by silu."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        type(mlp).__name__ in GATED
        and "forward" not in vars(mlp)
        and type(mlp.act_fn).__name__ in SILU
        and all(is_product(part) and part.bias is None for part in parts)
    )


class _FedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        made = [functional.linear(x, weight).flatten(0, -2) for weight in (gate, up)]
        ctx.save_for_backward(x, gate, up, down, *made)
        return x.new_zeros(()).expand(*x.shape[:-1], down.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, gate, up = ctx.saved_tensors
        rows, dy = x.flatten(0, -2), dy.flatten(0, -2)
        active, *grads = _gated_backward(dy @ weights[2], gate, up)
        pairs = (grads[0], rows), (grads[1], rows), (dy, active)
        of_weights = [a.T @ b if want else None for (a, b), want in zip(pairs, ctx.needs_input_grad[1:], strict=True)]
        return sum_of_products(grads, weights[:2]).view(x.shape), *of_weights
