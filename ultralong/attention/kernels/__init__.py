"""The attention kernels, and which one `auto` takes.

Names: `flash4`, `flash3`, `flash2` (the flash-attn packages), `cudnn`, `flash` (torch's own flash kernels, CUDA and
CPU), `efficient` (torch's memory-efficient kernel, the fast one for float32 on a GPU) and `reference`; and one that is
not exact and only taken when it is named, `flash4_fp8` (`ultralong.attention.kernels.fp8`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ultralong.attention.kernels.backward import attention_backward, backward_accumulate, backward_with_partials
from ultralong.attention.kernels.base import (
    BOTTOM_RIGHT,
    GQA,
    SOFTCAP,
    VARLEN,
    WINDOW,
    Kernel,
    PartialKVGrad,
    partials_at,
)
from ultralong.attention.kernels.fallbacks import attention_forward
from ultralong.attention.kernels.flash_attn import FlashAttn2, FlashAttn3
from ultralong.attention.kernels.flash_attn_4 import FlashAttn4
from ultralong.attention.kernels.fp8 import Fp8Forward
from ultralong.attention.kernels.fp8_blocks import vendor_kernel
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.kernels.torch_cpu import TorchCpu
from ultralong.attention.kernels.torch_cuda import TorchCudnn, TorchEfficient, TorchFlash
from ultralong.attention.spec import AttentionSpec

__all__ = [
    "BOTTOM_RIGHT",
    "GQA",
    "KERNELS",
    "SOFTCAP",
    "VARLEN",
    "WINDOW",
    "Kernel",
    "PartialKVGrad",
    "attention_backward",
    "attention_forward",
    "available_kernels",
    "backward_accumulate",
    "backward_with_partials",
    "choose_kernel",
    "get_kernel",
    "partials_at",
]

log = logging.getLogger(__name__)


def _flash4_fp8() -> Kernel:
    return Fp8Forward(get_kernel("flash4"), vendor_kernel())


# By name from fastest to slowest, the approximate one last; `auto` takes the first exact one that is present and can
# compute the call.
_MAKERS: dict[str, Callable[[], Kernel]] = {
    "flash4": FlashAttn4,
    "flash3": FlashAttn3,
    "cudnn": TorchCudnn,
    "flash2": FlashAttn2,
    "flash": TorchFlash,
    "efficient": TorchEfficient,
    "reference": Reference,
    "flash4_fp8": _flash4_fp8,
}
KERNELS: tuple[str, ...] = tuple(_MAKERS)


@cache
def get_kernel(name: str, device: str = "cuda") -> Kernel:
    """The kernel of a name.

    Args:
        name: One of `KERNELS`.
        device: "cuda" or "cpu"; `flash` is another kernel on each.

    Raises:
        ValueError: No kernel has this name, or this torch or GPU lacks it.
        ImportError: The kernel's package is not installed; the message says how to install it.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(('auto', *KERNELS))}; found {name!r}")
    return TorchCpu() if (name, device) == ("flash", "cpu") else _MAKERS[name]()


def available_kernels(device: str) -> dict[str, Kernel]:
    """Every kernel that is present for a device type, fastest first."""
    found: dict[str, Kernel] = {}
    for name in KERNELS:
        try:
            kernel = get_kernel(name, device)
        except (ImportError, ValueError):
            continue
        if kernel.device in (device, "any"):
            found[name] = kernel
    return found


def choose_kernel(name: str | Kernel, q: Tensor, spec: AttentionSpec, *, bottom_right: bool = False) -> Kernel:
    """The kernel for a call: the given one, or the fastest that is present and right for it.

    Args:
        name: A kernel's name, a kernel that is none of `KERNELS`, or "auto".
        q: Query (.., D) of the call, for its device, type and head size.
        spec: The call's spec.
        bottom_right: Whether calls will have more keys than queries (gathered KV).

    Returns:
        The kernel. `auto` logs its choice once per kind of call.

    Raises:
        ValueError: The named kernel can't compute this call, or none can; says why.
        ImportError: As `get_kernel`.
    """
    if name != "auto":
        kernel = get_kernel(name, q.device.type) if isinstance(name, str) else name
        reason = kernel.unsupported_reason(q, spec)
        if reason is not None:
            raise ValueError(f"kernel {kernel.name!r} can't compute this attention: {reason}")
        return kernel
    packed, square = spec.segments is not None, not bottom_right
    return _auto(q.device.type, q.dtype, q.shape[-1], packed, square, spec.window, spec.softcap)


@cache
def _auto(
    device: str,
    dtype: torch.dtype,
    head_size: int,
    packed: bool,
    square: bool,
    window: int | None,
    softcap: float | None,
) -> Kernel:
    q = torch.empty(1, 1, 1, head_size, dtype=dtype, device=device)
    spec = AttentionSpec(scale=1.0, window=window, softcap=softcap)
    reasons: list[str] = []
    fits: list[Kernel] = []
    for kernel in available_kernels(device).values():
        if kernel.approximate:
            continue
        reason = kernel.unsupported_reason(q, spec)
        if reason is None:
            fits.append(kernel)
        else:
            reasons.append(f"{kernel.name}: {reason}")
    if not fits:
        raise ValueError("no attention kernel can compute this call: " + "; ".join(reasons))
    wanted = set() if not packed else {VARLEN} if square else {VARLEN, BOTTOM_RIGHT}
    wanted = wanted if window is None else wanted | {WINDOW}
    choice = next((kernel for kernel in fits if wanted <= kernel.features and kernel.name != "reference"), fits[0])
    log.info(
        "attention kernel %s for %s, %s, head size %d%s%s%s",
        choice.name,
        device,
        dtype,
        head_size,
        ", packed" if packed else "",
        "" if square else ", gathered keys",
        f" (passed over {'; '.join(reasons)})" if reasons else "",
    )
    return choice
