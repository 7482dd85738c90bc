"""The flash-attn packages 3 (`flash_attn_interface`) and 2 (`flash_attn`), and what they share with flash-attn 4.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

All three have one pair of functions below their autograd wrappers that takes (B, T, H, D), or (T, H, D) with the
segments' cumulative lengths, aligns a causal mask at the bottom right, groups heads natively, and starts the backward
pass from a given (out, lse). Names and return values differ by version: arguments are passed by name, and those that
this version does not have are left out where they say nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, SOFTCAP, VARLEN, WINDOW, Kernel
from ultralong.attention.spec import AttentionSpec

INSTALL = {
    "flash4": "pip install flash-attn-4",
    "flash3": "build it from the hopper folder of the flash-attention repository (python setup.py install)",
    "flash2": "make flash",
}


def import_package(kernel: str, *modules: str) -> ModuleType:
    """The first of these modules that is there."""
    if not torch.cuda.is_available():
        raise ValueError(f"kernel {kernel!r} needs a CUDA GPU, and torch {torch.__version__} finds none")
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name.split(".")[0]):
                raise ImportError(f"kernel {kernel!r} is installed, but {error.name} that it needs is not") from error
    raise ImportError(f"kernel {kernel!r} is not installed: {INSTALL[kernel]}")


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Argument names with their defaults (None without), of a function or of a torch custom operator around one."""
    found = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: None if entry.default is entry.empty else entry.default for name, entry in found.items()}


class FlashAttn(Kernel):
    """What the three versions share."""

    device = "cuda"
    features = frozenset({GQA, VARLEN, BOTTOM_RIGHT, WINDOW, SOFTCAP})
    capability: tuple[int, int]  # smallest compute capability

    def unsupported_reason(self, q: Tensor, spec: AttentionSpec) -> str | None:
        """As every kernel's, and the GPU must be new enough."""
        reason = super().unsupported_reason(q, spec)
        if reason is None and torch.cuda.get_device_capability(q.device) < self.capability:
            found = torch.cuda.get_device_capability(q.device)
            reason = f"it needs compute capability {self.capability}, this GPU has {found}"
        return reason


def to_varlen(spec: AttentionSpec, *tensors: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and cu_seqlens as the varlen functions want them, or the tensors unchanged."""
    if spec.segments is None:
        return list(tensors), {}
    cu_q, cu_k = spec.segments.cu_seqlens(tensors[0].device)
    return [x[0] for x in tensors], {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": spec.segments.max_seqlen_q,
        "max_seqlen_k": spec.segments.max_seqlen_k,
    }


def with_batch(spec: AttentionSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undo `to_varlen`: a packed result has no batch dimension."""
    return tensors if spec.segments is None else tuple(x[None] for x in tensors)


class FlashAttn3(FlashAttn):
    """flash-attn 3, for Hopper."""

    name = "flash3"
    capability = (9, 0)

    def __init__(self) -> None:
        module = import_package(self.name, "flash_attn_interface", "flash_attn_3.flash_attn_interface")
        self._forward, self._backward = module._flash_attn_forward, module._flash_attn_backward
        self._defaults = parameters(self._forward), parameters(self._backward)

    def _options(self, spec: AttentionSpec, defaults: dict[str, Any]) -> dict[str, Any]:
        left, right = -1 if spec.window is None else spec.window - 1, 0 if spec.causal else -1
        known = {
            "softmax_scale": spec.scale,
            "softcap": spec.softcap or 0.0,
            "causal": spec.causal,
            "is_causal": spec.causal,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
        }
        return defaults | {name: value for name, value in known.items() if name in defaults}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, cu_seqlens = to_varlen(spec, q, k, v)
        named = self._options(spec, self._defaults[0]) | cu_seqlens | dict(zip("qkv", tensors))
        out, lse, *_ = self._forward(**named)
        out, lse = with_batch(spec, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`; writes into gradients made here."""
        (dout, q, k, v, out, lse), cu_seqlens = to_varlen(spec, dout, q, k, v, out, lse)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        names = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
        tensors = (dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), *grads)
        self._backward(**(self._options(spec, self._defaults[1]) | cu_seqlens | dict(zip(names, tensors))))
        dq, dk, dv = with_batch(spec, *grads)
        return dq, dk, dv


class FlashAttn2(FlashAttn):
    """flash-attn 2 (2.7 or newer), for Ampere and newer."""

    name = "flash2"
    capability = (8, 0)
    max_elements = 2**31 - 1
    rounds_per_query_head = True

    def __init__(self) -> None:
        module = import_package(self.name, "flash_attn.flash_attn_interface")
        self._functions = {
            packed: (getattr(module, f"_flash_attn_{packed}forward"), getattr(module, f"_flash_attn_{packed}backward"))
            for packed in ("", "varlen_")
        }
        if "window_size_left" not in parameters(self._functions[""][0]):
            raise ImportError("kernel 'flash2' needs flash-attn 2.7 or newer: make flash")

    def _options(self, spec: AttentionSpec) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size_left": -1 if spec.window is None else spec.window - 1,
            "window_size_right": 0 if spec.causal else -1,
            "softcap": spec.softcap or 0.0,
            "alibi_slopes": None,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, cu_seqlens = to_varlen(spec, q, k, v)
        function = self._functions["varlen_" if cu_seqlens else ""][0]
        out, lse, *_ = function(*tensors, **cu_seqlens, return_softmax=False, **self._options(spec))
        out, lse = with_batch(spec, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`; writes into gradients made here."""
        (dout, q, k, v, out, lse), cu_seqlens = to_varlen(spec, dout, q, k, v, out, lse)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        function = self._functions["varlen_" if cu_seqlens else ""][1]
        function(
            dout.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            *grads,
            **cu_seqlens,
            deterministic=False,
            **self._options(spec),
        )
        dq, dk, dv = with_batch(spec, *grads)
        return dq, dk, dv
