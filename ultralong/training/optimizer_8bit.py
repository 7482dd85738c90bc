"""8-bit optimizer states in checkpoints: as plain tensors, so that any mesh can load what another saved.

torchao holds a state as codes of one byte and a scale for each block of 256. Both are tensors; a block lies in one
process's share, so shares of codes and of scales are shares of the same rows, and torch's distributed checkpoint can
cut both anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ultralong.utils.extras import require

BLOCK = 256  # elements with a scale in common (torchao's default)
SMALLEST = 4096  # torchao leaves a share of fewer elements in the parameter's own type


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """The AdamW of torchao, its states of matrices in 8 bits; those of vectors (norms, biases) keep float32.

    Vectors are a ten-thousandth of a model. torchao goes by the elements of a process's share, so that a norm would be
    in 8 bits on one mesh and not on another.

    Raises:
        ImportError: torchao is not installed.
    """
    base = require("torchao.optim", "optim").AdamW8bit

    class AdamW8bit(base):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if p.ndim > 1 else torch.zeros_like(p.detach())

    return AdamW8bit


def check_shares(parameters: list[nn.Parameter]) -> None:
    """Refuse a sharding in which blocks of an 8-bit state would not follow the parameter's rows.

    Raises:
        ValueError: A parameter's rows do not divide evenly over the processes that share it; names its shape.
    """
    for parameter in parameters:
        if not isinstance(parameter, DTensor) or parameter.ndim == 1 or parameter.to_local().numel() < SMALLEST:
            continue
        shares = 1
        for place, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            shares *= size if isinstance(place, Shard) else 1
        if parameter.shape[0] % shares:
            raise ValueError(
                "optimizer.state_precision=8bit needs parameters whose rows divide evenly over "
                f"parallel.fsdp_shard_degree, found one of shape {tuple(parameter.shape)} over {shares} processes: "
                "use another parallel.fsdp_shard_degree, or optimizer.state_precision=float32."
            )


def plain_states(states: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with every 8-bit state as two plain tensors that share its memory.

    Args:
        states: As `torch.distributed.checkpoint.state_dict` gives it, with `state` by parameter name.

    Returns:
        The same with `NAME.codes` and `NAME.scale` in place of an 8-bit `NAME`; loading into them loads the state.
    """
    split = {}
    for parameter, values in states["state"].items():
        split[parameter] = {}
        for name, value in values.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "codes"):
                split[parameter] |= {
                    f"{name}.codes": _like(value, local.codes, value.shape),
                    f"{name}.scale": _like(value, local.scale, (value.numel() // BLOCK,)),
                }
            else:
                split[parameter][name] = value
    return {**states, "state": split}


def _like(value: Tensor, local: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A process's share as a tensor that is shared out as `value` is."""
    if not isinstance(value, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
