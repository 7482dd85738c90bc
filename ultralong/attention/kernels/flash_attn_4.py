"""flash-attn 4 (`flash_attn.cute`): the fastest kernel on Hopper and newer, compiled on first use.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.kernels import flash_attn_4_hooks as hooks
from ultralong.attention.kernels.base import PartialKVGrad
from ultralong.attention.kernels.flash_attn import FlashAttn, import_package, parameters, to_varlen, with_batch
from ultralong.attention.kernels.kept_kernels import kept_kernels
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.spec import AttentionSpec, VarlenSegments

log = logging.getLogger(__name__)

HOPPER = 9  # its major compute capability


def _on_hopper(x: Tensor) -> bool:
    return torch.cuda.get_device_capability(x.device)[0] == HOPPER


class FlashAttn4(FlashAttn):
    """flash-attn 4: compiled for this machine's GPU on first use (Hopper and newer), the fastest."""

    name = "flash4"
    capability = (9, 0)

    def __init__(self) -> None:
        with kept_kernels():
            module = import_package(self.name, "flash_attn.cute.interface")
        self._forward, self._takes_tiles = module._flash_attn_fwd, "tile_mn" in parameters(module._flash_attn_fwd)
        # The package's own backward function, and the one for calls whose queries see some more keys.
        self._backwards = [module._flash_attn_bwd, hooks.with_tiles(module._flash_attn_bwd)]
        convert = getattr(module, hooks.CONVERT, None)
        self._fp32_backwards = [hooks.Fp32Grads(backward, convert) for backward in self._backwards]
        self._fp32_known = self._fp32_backwards[0].possible
        self._checked = set[tuple[int, bool, bool, bool]]()

    def _options(self, spec: AttentionSpec) -> dict[str, Any]:
        window = {} if spec.window is None else {"window_size_left": spec.window - 1}
        return {"softmax_scale": spec.scale, "causal": spec.causal, "softcap": spec.softcap or 0.0, **window}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Lse is (B, H, T), or (H, T) packed."""
        tensors, cu_seqlens = to_varlen(spec, q, k, v)
        tile = {"tile_mn": hooks.FORWARD_TILE} if self._forward_on_tile(q, k, spec) else {}
        out, lse, *_ = self._forward(*tensors, return_lse=True, **cu_seqlens, **tile, **self._options(spec))
        out, lse = with_batch(spec, out, lse)
        return out, lse

    def _forward_on_tile(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
        return self._takes_tiles and hooks.sees_many_keys(q, k, spec, hooks.FORWARD_KEYS) and _on_hopper(q)

    def _backward_on_tile(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
        return hooks.sees_many_keys(q, k, spec, hooks.BACKWARD_KEYS) and _on_hopper(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`."""
        function = self._backwards[self._backward_on_tile(q, k, spec)]
        (q, k, v, out, dout, lse), cu_seqlens = to_varlen(spec, q, k, v, out, dout, lse)
        grads = function(q, k, v, out, dout, lse.contiguous(), **cu_seqlens, **self._options(spec))
        dq, dk, dv = with_batch(spec, *grads[:3])
        return dq, dk, dv

    def backward_accumulate(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        dk: Tensor,
        dv: Tensor,
    ) -> Tensor:
        """Adds its float32 dK and dV where it has them (grouped heads, Hopper), of packed rows for shared segments."""
        if not self._has_fp32(q, k):
            return super().backward_accumulate(dout, q, k, v, out, lse, spec, dk, dv)
        dq, to_keys, to_values, buffers = self._backward_fp32(dout, q, k, v, out, lse, spec)
        for name, total, part in (("dk", dk, to_keys), ("dv", dv, to_values)):
            _add(total, name, part, buffers, spec.segments)
        return dq

    def backward_with_partials(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor, list[PartialKVGrad]]:
        """Float32 dK and dV of shared segments, where it has them."""
        segments = spec.segments
        if segments is None or not segments.shared or not self._has_fp32(q, k):
            return super().backward_with_partials(dout, q, k, v, out, lse, spec)
        dq, dk, dv, buffers = self._backward_fp32(dout, q, k, v, out, lse, spec)
        partials = []
        for segment in sorted(segments.shared):
            keys = slice(*segments.k[segment : segment + 2])
            sides = []
            for name, part in (("dk", dk[:, keys]), ("dv", dv[:, keys])):
                fp32 = accumulation_dtype(part.dtype)
                sides.append(part.to(fp32) if buffers is None else torch.zeros_like(part, dtype=fp32))
                if buffers is not None:
                    buffers.add_segment(sides[-1][0], name, segment, keys.start)
            partials.append((keys, sides[0], sides[1]))
        return dq, dk, dv, partials

    def _has_fp32(self, q: Tensor, k: Tensor) -> bool:
        return self._fp32_known and q.shape[2] != k.shape[2]

    def _backward_fp32(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor, hooks.Fp32Buffers | None]:
        """The gradients of q, k and v, and the float32 buffers of dK and dV where they can be read.

        dK and dV are only rounded where the buffers can't be read, for packed rows, and in a kind of call that has not
        been checked yet: the first of each kind is compared with what the package rounds.
        """
        tile = self._backward_on_tile(q, k, spec)
        kind = (q.shape[3], spec.causal, spec.segments is not None, tile)
        (q, k, v, out, dout, lse), cu_seqlens = to_varlen(spec, q, k, v, out, dout, lse)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        new = kind not in self._checked
        dq, buffers = self._fp32_backwards[tile](
            dk,
            dv,
            q,
            k,
            v,
            out,
            dout,
            lse.contiguous(),
            rounded=new or spec.segments is not None,
            **cu_seqlens,
            **self._options(spec),
        )
        dq, dk, dv = with_batch(spec, dq, dk, dv)
        if new and buffers.readable and not _agree(buffers, dk, dv, spec):
            log.warning(
                "flash-attn 4 keeps its float32 dK and dV in an order that is not known here: partial dK and dV are "
                "rounded one by one, which adds a fifth to their error"
            )
            self._fp32_known = False
        self._checked.add(kind)
        return dq, dk, dv, buffers if buffers.readable and self._fp32_known else None


def _agree(buffers: hooks.Fp32Buffers, dk: Tensor, dv: Tensor, spec: AttentionSpec) -> bool:
    """Whether a call's float32 buffers, rounded, are the gradients that the package gave."""
    for name, part in (("dk", dk), ("dv", dv)):
        total = torch.zeros_like(part, dtype=accumulation_dtype(part.dtype))
        _add(total, name, part, buffers, None if spec.segments is None else replace(spec.segments, shared=None))
        tiny = torch.finfo(part.dtype).tiny
        if not torch.allclose(total, part.to(total.dtype), rtol=2**-7, atol=tiny, equal_nan=True):
            return False
    return True


def _add(
    total: Tensor, name: str, rounded: Tensor, buffers: hooks.Fp32Buffers | None, segments: VarlenSegments | None
) -> None:
    """Add a call's dK or dV to `total` (B, T, K, D): from float32 where the segment is shared, else as rounded."""
    if buffers is None:
        total += rounded
    elif segments is None:
        buffers.add_to(total, name)
    else:
        for shared, run in groupby(range(segments.count), segments.is_shared):
            members = list(run)
            keys = slice(segments.k[members[0]], segments.k[members[-1] + 1])
            if not shared:
                total[:, keys] += rounded[:, keys]
                continue
            for segment in members:
                start, stop = segments.k[segment : segment + 2]
                buffers.add_segment(total[0, start:stop], name, segment, start)
