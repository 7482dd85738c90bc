"""Frozen weights in 4 bits (QLoRA, arXiv 2305.14314): torchao's NF4 tensors, which FSDP2 shards and gathers as codes.

Blocks of 64 weights have a scale in common, itself of 8 bits; a block's codes are 16 quantiles of a normal
distribution. A layer's weight is made again in the run's type where a product takes it, forward and backward, and is
dropped after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultralong.utils.extras import require

BLOCK = 64  # weights with a scale in common
SCALES = 256  # scales with a scale in common, at most
EVENLY = 8  # shards that small matrices too can be cut into
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * SCALES)  # of a weight, its share of both kinds of scales included


class FourBitLinear(nn.Linear):
    """A frozen linear layer whose weight is an NF4 tensor once `hold_in_four_bits` has seen it, plain before.

    It is no plain `nn.Linear` to layers with a custom backward pass: they call it, and do not read its weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in) times the weight, as the run's type has it, plus the bias: (..., out)."""
        result: Tensor = _Dequantised.apply(x, self.weight, self.bias)
        return result


class _Dequantised(torch.autograd.Function):
    """A product with a frozen weight that is dequantised for it; the backward pass keeps the codes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, dequantised(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return dy @ dequantised(weight, dy.dtype), None, None


def dequantised(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (out, in) in `dtype`, whether it is an NF4 tensor or a plain one."""
    found: Any = weight
    plain: Tensor = found.get_original_weight() if is_quantised(weight) else found
    return plain.to(dtype)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is an NF4 tensor; torchao need not be there to tell."""
    return hasattr(weight, "get_original_weight")


def quantised(weight: Tensor) -> Tensor:
    """A weight (out, in) as an NF4 tensor, the same for any number of shards.

    Raises:
        ImportError: torchao is not installed.
    """
    found: Tensor = to_nf4()(weight.contiguous(), BLOCK, _scales(weight.numel()))
    return found


def to_nf4() -> Callable[[Tensor, int, int], Tensor]:
    """The function of torchao that quantises a tensor, by its blocks of weights and of scales.

    Raises:
        ImportError: torchao is not installed.
    """
    place = require("torchao.quantization", "optim")
    place = place if hasattr(place, "to_nf4") else require("torchao.dtypes", "optim")  # up to torchao 0.17
    found: Callable[[Tensor, int, int], Tensor] = place.to_nf4
    return found


def _scales(numel: int) -> int:
    return math.gcd(SCALES, numel // BLOCK // EVENLY)


def mark(model: Any) -> None:
    """Make every frozen linear module of the decoder layers a `FourBitLinear`, in place; weights stay as they are.

    Raises:
        ValueError: A layer holds experts stacked in one tensor, which no linear module multiplies with.
    """
    for layer in model.get_decoder().layers:
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 2:
                raise ValueError(
                    f"lora.base: nf4 is for linear modules, and {name} is {parameter.ndim}-dimensional: experts "
                    "stacked in one tensor, which would stay as they are. Set lora.base to full."
                )
        for module in layer.modules():
            if type(module) is nn.Linear and not module.weight.requires_grad:
                module.__class__ = FourBitLinear


def marked(module: nn.Module) -> Iterator[tuple[str, FourBitLinear]]:
    """The modules that `mark` found, with their names."""
    return ((name, each) for name, each in module.named_modules() if isinstance(each, FourBitLinear))


def check_shapes(model: nn.Module, shards: int) -> None:
    """Refuse weights that do not divide into blocks, or blocks into shards.

    Raises:
        ValueError: Names the module.
    """
    for name, module in marked(model):
        rows, numel = module.weight.shape[0], module.weight.numel()
        if numel % (BLOCK * EVENLY) or rows % shards or numel // BLOCK // _scales(numel) % shards:
            raise ValueError(
                f"lora.base: nf4 can't cut {name} {tuple(module.weight.shape)} into {shards} shards of whole blocks of "
                f"{BLOCK} weights. Set parallel.fsdp_shard_degree to a smaller power of two, or lora.base to full."
            )


def hold_in_four_bits(module: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Quantise the weights of the modules that `mark` found, on the device where they will be used; returns them."""
    found = set()
    for _, each in marked(module):
        each.weight = nn.Parameter(quantised(each.weight.detach().to(device)), requires_grad=False)
        found.add(each.weight)
    return found
