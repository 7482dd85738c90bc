"""A function of tokens, computed a tile of tokens at a time in both passes.

Legend: B batch, T tokens, d hidden size, I intermediate size.

A gated feed-forward layer makes three tensors of (T, I): for Llama-3.1-8B at 524,288 tokens, 45 GB. Tokens do not meet
in it, so it can be computed tile by tile, and in the backward pass tile by tile again (ALST's tiled MLP, arXiv
2506.13996). Each tile's gradients of the weights are added in float32 and rounded once, as one product would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, parameters: Sequence[Tensor]) -> Tensor:
    """`function(x)` for a function that treats every token alike, `tile` tokens at a time.

    Args:
        function: From (B, t, d) to (B, t, e), for any t; it reads `parameters`.
        x: (B, T, d).
        tile: Tokens of a tile.
        parameters: What the function reads that may need a gradient.

    Returns:
        (B, T, e), as the function itself would give.

    Raises:
        ValueError: The tile is smaller than one token.
    """
    if tile < 1:
        raise ValueError(f"a tile must have 1 token or more, found {tile}")
    if x.shape[1] <= tile:
        return function(x)
    return _Tiled.apply(function, tile, x, *parameters)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], tile: int, x: Tensor, *parameters: Tensor) -> Tensor:
        kind = x.device.type
        ctx.function, ctx.tile = function, tile
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.save_for_backward(x, *parameters)
        return torch.cat([function(part) for part in x.split(tile, 1)], 1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        wide = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        parts = []
        for part, grad in zip(x.split(ctx.tile, 1), dout.split(ctx.tile, 1), strict=True):
            leaf = part.detach().requires_grad_()
            # cache_enabled=False: a weight's cast must belong to this tile's graph, not to one that is gone.
            with torch.enable_grad(), torch.autocast(x.device.type, ctx.autocast, ctx.autocast is not None, False):
                out = ctx.function(leaf)
            to_input, *to_weights = torch.autograd.grad(out, [leaf, *wanted], grad)
            parts.append(to_input)
            for total, share in zip(wide, to_weights, strict=True):
                total += share
        rounded = iter([total.to(p.dtype) for total, p in zip(wide, wanted, strict=True)])
        grads = [next(rounded) if needed else None for needed in ctx.needs_input_grad[3:]]
        return None, None, torch.cat(parts, 1), *grads


def tile_layers(layers: Sequence[nn.Module], tile: int) -> None:
    """Let each layer's `mlp` and norms compute a tile of tokens at a time; parameters and their names stay as they are.

    Norms are among them because they work in float32: of a bfloat16 tensor they keep a copy twice as large.

    Raises:
        ValueError: A layer has no module called `mlp`.
    """
    for layer in layers:
        if not isinstance(getattr(layer, "mlp", None), nn.Module):
            raise ValueError(f"{type(layer).__name__} has no module 'mlp' to tile: set memory.mlp_tile to 0")
        for name, module in layer.named_children():
            if name == "mlp" or name.endswith("norm"):
                module.forward = partial(_forward, module, type(module).forward, tile)


def _forward(module: nn.Module, whole: Callable[[nn.Module, Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
    return tiled(partial(whole, module), x, tile, list(module.parameters()))
