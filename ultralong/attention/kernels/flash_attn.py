"""The flash-attn packages: 4 (`flash_attn.cute`), 3 (`flash_attn_interface`) and 2 (`flash_attn`).

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

All three have one pair of functions below their autograd wrappers that takes (B, T, H, D), or (T, H, D) with the
pieces' edges, aligns a causal mask at the bottom right, groups heads natively, and starts the backward pass from a
given (out, lse). Names and return values differ by version: arguments are passed by name, and those that this version
does not have are left out where they say nothing.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.kernels import flash4_tiles
from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, SOFTCAP, VARLEN, WINDOW, Kernel, Share
from ultralong.attention.kernels.flash4_sums import CONVERT, Sums, SumsOf
from ultralong.attention.lse_merge import accumulator
from ultralong.attention.spec import Rule, Spans

log = logging.getLogger(__name__)

HOPPER = 9  # its major compute capability
INSTALL = {
    "flash4": "pip install flash-attn-4",
    "flash3": "build it from the hopper folder of the flash-attention repository (python setup.py install)",
    "flash2": "make flash",
}


def _import(kernel: str, *modules: str) -> ModuleType:
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


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Argument names with their defaults (None without), of a function or of a torch custom operator around one."""
    found = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: None if entry.default is entry.empty else entry.default for name, entry in found.items()}


class _FlashAttn(Kernel):
    """What the three versions share."""

    device = "cuda"
    features = frozenset({GQA, VARLEN, BOTTOM_RIGHT, WINDOW, SOFTCAP})
    capability: tuple[int, int]  # smallest compute capability

    def refusal(self, q: Tensor, rule: Rule) -> str | None:
        """As every kernel's, and the GPU must be new enough."""
        reason = super().refusal(q, rule)
        if reason is None and torch.cuda.get_device_capability(q.device) < self.capability:
            found = torch.cuda.get_device_capability(q.device)
            reason = f"it needs compute capability {self.capability}, this GPU has {found}"
        return reason


def _layout(rule: Rule, *tensors: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and edges as the packed functions want them, or the tensors unchanged."""
    if rule.spans is None:
        return list(tensors), {}
    cu_q, cu_k = rule.spans.tensors(tensors[0].device)
    return [x[0] for x in tensors], {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": rule.spans.max_q,
        "max_seqlen_k": rule.spans.max_k,
    }


def _on_hopper(x: Tensor) -> bool:
    return torch.cuda.get_device_capability(x.device)[0] == HOPPER


def _batched(rule: Rule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undo `_layout`: a packed result has no batch dimension."""
    return tensors if rule.spans is None else tuple(x[None] for x in tensors)


class FlashAttn4(_FlashAttn):
    """flash-attn 4: compiled for the GPU at hand on first use (Hopper and newer), the fastest."""

    name = "flash4"
    capability = (9, 0)

    def __init__(self) -> None:
        module = _import(self.name, "flash_attn.cute.interface")
        self._forward, self._takes_tiles = module._flash_attn_fwd, "tile_mn" in _parameters(module._flash_attn_fwd)
        # The package's own backward function, and the one for calls whose queries see some more keys.
        self._backwards = [module._flash_attn_bwd, flash4_tiles.with_tiles(module._flash_attn_bwd)]
        self._sums = [SumsOf(backward, getattr(module, CONVERT, None)) for backward in self._backwards]
        self._sums_known = self._sums[0].possible
        self._checked = set[tuple[int, bool, bool, bool]]()

    def _options(self, rule: Rule) -> dict[str, Any]:
        window = {} if rule.window is None else {"window_size_left": rule.window - 1}
        return {"softmax_scale": rule.scale, "causal": rule.causal, "softcap": rule.softcap or 0.0, **window}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, edges = _layout(rule, q, k, v)
        tile = {"tile_mn": flash4_tiles.FORWARD} if self._on_tile(q, k, rule) else {}
        out, lse, *_ = self._forward(*tensors, return_lse=True, **edges, **tile, **self._options(rule))
        out, lse = _batched(rule, out, lse)
        return out, lse

    def _on_tile(self, q: Tensor, k: Tensor, rule: Rule) -> bool:
        return self._takes_tiles and flash4_tiles.sees_many(q, k, rule, flash4_tiles.MANY) and _on_hopper(q)

    def _backward_on_tile(self, q: Tensor, k: Tensor, rule: Rule) -> bool:
        return flash4_tiles.sees_many(q, k, rule, flash4_tiles.SOME) and _on_hopper(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`."""
        function = self._backwards[self._backward_on_tile(q, k, rule)]
        (q, k, v, out, dout, lse), edges = _layout(rule, q, k, v, out, dout, lse)
        grads = function(q, k, v, out, dout, lse.contiguous(), **edges, **self._options(rule))
        dq, dk, dv = _batched(rule, *grads[:3])
        return dq, dk, dv

    def add_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rule: Rule,
        dk: Tensor,
        dv: Tensor,
    ) -> Tensor:
        """Adds its float32 sums where it has them (grouped heads, Hopper), for packed rows those of shared pieces."""
        if not self._has_sums(q, k):
            return super().add_backward(dout, q, k, v, out, lse, rule, dk, dv)
        dq, *rounded, sums = self._with_sums(dout, q, k, v, out, lse, rule)
        for name, total, part in zip(("dk", "dv"), (dk, dv), rounded, strict=True):
            _add(total, name, part, sums, rule.spans)
        return dq

    def backward_with_shares(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor, list[Share]]:
        """Its float32 sums of shared pieces, where it has them."""
        if not rule.spans.shared or not self._has_sums(q, k):
            return super().backward_with_shares(dout, q, k, v, out, lse, rule)
        *grads, sums = self._with_sums(dout, q, k, v, out, lse, rule)
        shares = []
        for piece in sorted(rule.spans.shared):
            keys, sides = slice(*rule.spans.k[piece : piece + 2]), []
            for name, part in zip(("dk", "dv"), grads[1:], strict=True):
                wide = (
                    part[:, keys].to(accumulator(part.dtype))
                    if sums is None
                    else torch.zeros_like(part[:, keys], dtype=accumulator(part.dtype))
                )
                if sums is not None:
                    sums.add_piece(wide[0], name, piece, keys.start)
                sides.append(wide)
            shares.append((keys, *sides))
        return *grads, shares

    def _has_sums(self, q: Tensor, k: Tensor) -> bool:
        return self._sums_known and q.shape[2] != k.shape[2]

    def _with_sums(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor, Sums | None]:
        """The gradient of q; those of k and v rounded (of one piece, only until its sums are trusted); the sums."""
        tile = self._backward_on_tile(q, k, rule)
        kind = (q.shape[3], rule.causal, rule.spans is not None, tile)
        (q, k, v, out, dout, lse), edges = _layout(rule, q, k, v, out, dout, lse)
        rounded = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)]
        new = kind not in self._checked
        dq, sums = self._sums[tile](
            *rounded,
            q,
            k,
            v,
            out,
            dout,
            lse.contiguous(),
            rounded=new or rule.spans is not None,
            **edges,
            **self._options(rule),
        )
        dq, *rounded = _batched(rule, dq, *rounded)
        if new and sums.there and not self._are_right(sums, rounded, rule):
            log.warning(
                "flash-attn 4 keeps its sums in an order that is not known here: shares of dK and dV are "
                "rounded one by one, which adds a fifth to their error"
            )
            self._sums_known = False
        self._checked.add(kind)
        return dq, *rounded, sums if sums.there and self._sums_known else None

    def _are_right(self, sums: Sums, rounded: list[Tensor], rule: Rule) -> bool:
        """Whether a call's sums, rounded, are the gradients that the package gave."""
        for name, part in zip(("dk", "dv"), rounded, strict=True):
            total = torch.zeros_like(part, dtype=accumulator(part.dtype))
            _add(total, name, part, sums, None if rule.spans is None else replace(rule.spans, shared=None))
            tiny = torch.finfo(part.dtype).tiny
            if not torch.allclose(total, part.to(total.dtype), rtol=2**-7, atol=tiny, equal_nan=True):
                return False
        return True


def _add(total: Tensor, name: str, rounded: Tensor, sums: Sums | None, spans: Spans | None) -> None:
    """Add a call's gradient of keys or values to `total` (B, T, K, D): its sums where shared, else what it rounded."""
    if sums is None:
        total += rounded
    elif spans is None:
        sums.add_to(total, name)
    else:
        for shared, run in groupby(range(spans.count), spans.is_shared):
            pieces = list(run)
            keys = slice(spans.k[pieces[0]], spans.k[pieces[-1] + 1])
            if not shared:
                total[:, keys] += rounded[:, keys]
                continue
            for piece in pieces:
                sums.add_piece(total[0, spans.k[piece] : spans.k[piece + 1]], name, piece, spans.k[piece])


class FlashAttn3(_FlashAttn):
    """flash-attn 3, for Hopper."""

    name = "flash3"
    capability = (9, 0)

    def __init__(self) -> None:
        module = _import(self.name, "flash_attn_interface", "flash_attn_3.flash_attn_interface")
        self._forward, self._backward = module._flash_attn_forward, module._flash_attn_backward
        self._defaults = _parameters(self._forward), _parameters(self._backward)

    def _options(self, rule: Rule, defaults: dict[str, Any]) -> dict[str, Any]:
        left, right = -1 if rule.window is None else rule.window - 1, 0 if rule.causal else -1
        known = {
            "softmax_scale": rule.scale,
            "softcap": rule.softcap or 0.0,
            "causal": rule.causal,
            "is_causal": rule.causal,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
        }
        return defaults | {name: value for name, value in known.items() if name in defaults}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, edges = _layout(rule, q, k, v)
        named = self._options(rule, self._defaults[0]) | edges | dict(zip("qkv", tensors))
        out, lse, *_ = self._forward(**named)
        out, lse = _batched(rule, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`; writes into gradients made here."""
        (dout, q, k, v, out, lse), edges = _layout(rule, dout, q, k, v, out, lse)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        names = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
        tensors = (dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), *grads)
        self._backward(**(self._options(rule, self._defaults[1]) | edges | dict(zip(names, tensors))))
        dq, dk, dv = _batched(rule, *grads)
        return dq, dk, dv


class FlashAttn2(_FlashAttn):
    """flash-attn 2 (2.7 or newer), for Ampere and newer."""

    name = "flash2"
    capability = (8, 0)
    max_elements = 2**31 - 1
    rounds_heads = True

    def __init__(self) -> None:
        module = _import(self.name, "flash_attn.flash_attn_interface")
        self._functions = {
            packed: (getattr(module, f"_flash_attn_{packed}forward"), getattr(module, f"_flash_attn_{packed}backward"))
            for packed in ("", "varlen_")
        }
        if "window_size_left" not in _parameters(self._functions[""][0]):
            raise ImportError("kernel 'flash2' needs flash-attn 2.7 or newer: make flash")

    def _options(self, rule: Rule) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": rule.scale,
            "causal": rule.causal,
            "window_size_left": -1 if rule.window is None else rule.window - 1,
            "window_size_right": 0 if rule.causal else -1,
            "softcap": rule.softcap or 0.0,
            "alibi_slopes": None,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, edges = _layout(rule, q, k, v)
        function = self._functions["varlen_" if edges else ""][0]
        out, lse, *_ = function(*tensors, **edges, return_softmax=False, **self._options(rule))
        out, lse = _batched(rule, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`; writes into gradients made here."""
        (dout, q, k, v, out, lse), edges = _layout(rule, dout, q, k, v, out, lse)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        function = self._functions["varlen_" if edges else ""][1]
        function(
            dout.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            *grads,
            **edges,
            deterministic=False,
            **self._options(rule),
        )
        dq, dk, dv = _batched(rule, *grads)
        return dq, dk, dv
