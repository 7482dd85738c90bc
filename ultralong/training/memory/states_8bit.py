"""AdamW with states in 8 bits.

torchao holds an 8-bit state as codes of one byte and a scale for each block of 256. Both are tensors; a block lies in
one process's shard, so shards of codes and of scales are shards of the same rows, and torch's distributed checkpoint
can reshard both: any mesh can load what another saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ultralong.utils.extras import require

BLOCK = 256  # elements with a scale in common (torchao's default)
SMALLEST = 4096  # torchao leaves a shard of fewer elements in the parameter's own type


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """The AdamW of torchao, its states of matrices in 8 bits; those of vectors (norms, biases) keep float32.

    Vectors are a ten-thousandth of a model. torchao goes by the elements of a process's shard, so that a norm would be
    in 8 bits on one mesh and not on another.

    The first step compiles. torch's compiler would time several variants of each kernel. Where copies on the GPU of
    what these overwrite would raise its peak, it copies to pinned memory of the host, which torch then holds to the
    end: three float32 copies of the largest matrix, each rounded up to a power of two, 6 GiB for Llama-3.1-8B and 3 GiB
    for Llama-3.2-1B (`copy_args_to_cpu_if_needed` in torch/_inductor/runtime/triton_heuristics.py). So none are timed.

    Raises:
        ImportError: torchao is not installed.
    """
    from torch._inductor import config as inductor_config  # brings the compiler with it

    base: Any = require("torchao.optim", "optim").AdamW8bit

    class AdamW8bit(base):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if p.ndim > 1 else torch.zeros_like(p.detach())

        def step(self, closure: Any = None) -> Any:
            with inductor_config.patch({"triton.autotune_pointwise": False}):
                return super().step(closure)

    return AdamW8bit


def check_even_shards(parameters: list[nn.Parameter]) -> None:
    """Refuse a sharding in which blocks of an 8-bit state would not follow the parameter's rows.

    Raises:
        ValueError: A parameter's rows do not divide evenly over its shards; names its shape.
    """
    for parameter in parameters:
        if not isinstance(parameter, DTensor) or parameter.ndim == 1 or parameter.to_local().numel() < SMALLEST:
            continue
        shards = 1
        for place, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            shards *= size if isinstance(place, Shard) else 1
        if parameter.shape[0] % shards:
            raise ValueError(
                "optimizer.state_precision=8bit needs parameters whose rows divide evenly over "
                f"parallel.fsdp_shard_degree, found one of shape {tuple(parameter.shape)} over {shards} processes: "
                "use another parallel.fsdp_shard_degree, or optimizer.state_precision=float32."
            )


def plain_tensor_states(states: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with every 8-bit state as two plain tensors that share its memory.

    Args:
        states: As `torch.distributed.checkpoint.state_dict` gives it, with `state` by parameter name.

    Returns:
        The same with `NAME.codes` and `NAME.scale` in place of an 8-bit `NAME`; loading into them loads the state.
    """
    split: dict[str, dict[str, Any]] = {}
    for parameter, values in states["state"].items():
        split[parameter] = {}
        for name, value in values.items():
            local: Any = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "codes"):
                split[parameter] |= {
                    f"{name}.codes": _like(value, local.codes, value.shape),
                    f"{name}.scale": _like(value, local.scale, (value.numel() // BLOCK,)),
                }
            else:
                split[parameter][name] = value
    return {**states, "state": split}


def _like(value: Tensor, local: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A process's shard as a tensor that is sharded as `value` is."""
    if not isinstance(value, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
