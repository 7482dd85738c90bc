"""Functions of tokens, computed a tile of tokens at a time in both passes.

Legend: B batch, T tokens, t tokens of a tile, d hidden size, I intermediate size.

A gated feed-forward layer makes three tensors of (T, I): for Llama-3.1-8B at 524,288 tokens, 45 GB. Tokens do not meet
in it, so it can be computed tile by tile, and in the backward pass tile by tile again (ALST's tiled MLP, arXiv
2506.13996). Each tile's gradients of the weights are added in float32 and rounded once, as one product would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Autocast = torch.dtype | None


def tiles(tokens: int, tile: int) -> Iterator[slice]:
    """Ranges of at most `tile` tokens that cover all of them, in order."""
    return (slice(start, min(start + tile, tokens)) for start in range(0, tokens, tile))


def autocast_now(x: Tensor) -> Autocast:
    """The type that autocast computes in around this call, None without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def backward_tiles(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    grads: Callable[[slice], Sequence[Tensor]],
    into: Sequence[Tensor],
    parameters: Sequence[Tensor],
    tile: int,
    autocast: Autocast,
    add: bool = False,
) -> list[Tensor | None]:
    """The backward pass of `function(*inputs)`, each tile recomputed and then freed.

    Args:
        function: From tiles (B, t, ...) to tiles (B, t, ...), every token by itself; it reads `parameters`.
        inputs: (B, T, ...) each.
        grads: Gradients of the results (B, t, ...) for a range of tokens; rounded or widened to the results' types.
        into: Where the gradients of the inputs go, (B, T, ...) each. `grads` may read one of them: a tile is read
            before it is written.
        parameters: What the function reads.
        tile: Tokens of a tile.
        autocast: The type that the forward pass computed in under autocast.
        add: Add to what `into` holds.

    Returns:
        The gradients of the parameters, None for those that need none.
    """
    wanted = [p for p in parameters if p.requires_grad]
    fp32 = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
    kind = inputs[0].device.type
    for place in tiles(inputs[0].shape[1], tile):
        leaves = [x[:, place].detach().requires_grad_() for x in inputs]
        # cache_enabled=False: a weight's cast must belong to this tile's graph, not to one that is gone.
        with torch.enable_grad(), torch.autocast(kind, autocast, autocast is not None, False):
            results = function(*leaves)
        found = torch.autograd.grad(
            results, [*leaves, *wanted], [g.to(r.dtype) for g, r in zip(grads(place), results, strict=True)]
        )
        for target, grad in zip(into, found, strict=False):
            if add:
                target[:, place] += grad
            else:
                target[:, place] = grad
        for total, grad in zip(fp32, found[len(leaves) :], strict=True):
            total += grad
    rounded = iter([total.to(p.dtype) for total, p in zip(fp32, wanted, strict=True)])
    return [next(rounded) if p.requires_grad else None for p in parameters]


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
        ctx.function, ctx.tile, ctx.autocast = function, tile, autocast_now(x)
        ctx.save_for_backward(x, *parameters)
        return map_tiles(lambda place: function(x[:, place]), x.shape[1], tile)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        dx = torch.empty_like(x)
        grads = backward_tiles(
            lambda part: [ctx.function(part)],
            [x],
            lambda place: [dout[:, place]],
            [dx],
            parameters,
            ctx.tile,
            ctx.autocast,
        )
        return None, None, dx, *grads


def map_tiles(function: Callable[[slice], Tensor], tokens: int, tile: int) -> Tensor:
    """The results (B, t, ...) of every tile's range, written one after another into (B, T, ...)."""
    first, *others = tiles(tokens, tile)
    part = function(first)
    whole = part.new_empty((part.shape[0], tokens, *part.shape[2:]))
    whole[:, first] = part
    del part
    for place in others:
        whole[:, place] = function(place)
    return whole


def tile_module(module: nn.Module, tile: int) -> None:
    """Let a module of one tensor (B, T, d), such as a norm, compute a tile of tokens at a time.

    Its parameters and their names stay as they are. A norm works in float32: of a bfloat16 tensor it keeps a copy twice
    as large.
    """
    whole = type(module).forward
    module.forward = lambda x: tiled(lambda part: whole(module, part), x, tile, list(module.parameters()))
