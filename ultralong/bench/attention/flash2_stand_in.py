"""Stand-in for the two functions of flash-attn 2 that ring-flash-attn's zigzag ring calls, on torch's own kernels.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

flash-attn 2 has no wheel for recent torch and takes long to build; torch has FlashAttention-2's kernels built in.
The functions have the names, arguments and results of `flash_attn/flash_attn_interface.py` 2.8; what is measured with
them is ring-flash-attn's own code on torch's kernels, and its row says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType

import torch
from torch import Tensor

NAME = "flash_attn.flash_attn_interface"
_aten = torch.ops.aten


def _refuse_options(**options: object) -> None:
    """Raises ValueError for options of flash-attn 2 that are not handed on."""
    given = {name: value for name, value in options.items() if value not in (None, 0, 0.0, False, -1)}
    if given:
        raise ValueError(f"the stand-in for flash-attn 2 has none of the options {given}: install flash-attn 2")


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """Output (B, T, H, D) and log-sum-exp (B, H, T) of q (B, T, H, D), k and v (B, T, K, D)."""
    _refuse_options(
        dropout_p=dropout_p,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_softmax=return_softmax,
    )
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
    )
    return out, lse, None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Gradients of q, k and v, written into dq, dk and dv; torch's operator makes its own, so they are copied once."""
    _refuse_options(
        dropout_p=dropout_p,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    tensors = [x.contiguous() for x in (dout, q, k, v, out, softmax_lse)]
    grads = _aten._flash_attention_backward(
        *tensors, None, None, q.shape[1], k.shape[1], 0.0, causal, *state, scale=softmax_scale
    )
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad)


def _absent(*_: object, **__: object) -> None:
    """For the packed functions, which ring-flash-attn imports and its zigzag ring does not call."""
    raise NotImplementedError("the stand-in for flash-attn 2 has no packed calls: install flash-attn 2")


@contextmanager
def stand_in() -> Iterator[None]:
    """Inside this context, importing `flash_attn.flash_attn_interface` gives this module's functions."""
    module = ModuleType(NAME, __doc__)
    vars(module).update(
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
        _flash_attn_varlen_forward=_absent,
        _flash_attn_varlen_backward=_absent,
    )
    names = [NAME] if PathFinder.find_spec("flash_attn") else ["flash_attn", NAME]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: module if name == NAME else ModuleType(name) for name in names})
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was


def zigzag_module() -> ModuleType:
    """ring-flash-attn's zigzag ring alone: its package also loads an adapter for transformers that newer ones break.

    Raises:
        ModuleNotFoundError: ring-flash-attn or something that it imports is not installed.
    """
    package, name = "ring_flash_attn", "ring_flash_attn.zigzag_ring_flash_attn"
    spec = PathFinder.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if package not in sys.modules:
        shell = ModuleType(package)
        shell.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = shell
        try:
            return importlib.import_module(name)
        finally:
            if sys.modules[package] is shell:
                del sys.modules[package]
    return importlib.import_module(name)
