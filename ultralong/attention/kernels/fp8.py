"""Attention whose forward pass computes far keys in FP8, an experiment behind its name `flash4_fp8`.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, n queries.

A block of queries sees the keys near it, on the causal diagonal, through the exact kernel, and all keys before those
in FP8 (`ultralong.attention.kernels.fp8_blocks`), a block of keys after the other, merged in float32. The backward
pass is the exact kernel's, from the merged output and log-sum-exp. So results are near the exact ones and not equal:
`auto` never takes this kernel, and a run that asks for it says so in its log.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from torch import Tensor

from ultralong.attention.kernels.base import Kernel, PartialKVGrad
from ultralong.attention.kernels.fallbacks import attention_forward
from ultralong.attention.kernels.fp8_blocks import KEYS, QUERIES, TILE, BlockKernel, merge_keys, quantise_keys
from ultralong.attention.kernels.segments import segment_slices
from ultralong.attention.lse_merge import merge_into
from ultralong.attention.spec import AttentionSpec, VarlenSegments

log = logging.getLogger(__name__)

HEAD_SIZE = 128
HOPPER = 9  # major compute capability


class Fp8Forward(Kernel):
    """An exact kernel with far keys of the forward pass in FP8.

    Args:
        exact: Computes the diagonal, short calls, windows and soft caps, and every backward pass.
        block_kernel: Computes queries against keys in FP8.
        queries: Queries of one block, a multiple of 128.
        keys: Keys of one FP8 call at most, a multiple of 128.
    """

    name: ClassVar[str] = "flash4_fp8"
    device: ClassVar[str] = "cuda"
    approximate = True

    def __init__(self, exact: Kernel, block_kernel: BlockKernel, queries: int = QUERIES, keys: int = KEYS) -> None:
        self._exact, self._blocks, self._queries, self._keys = exact, block_kernel, queries, keys
        self.features, self.head_sizes, self.max_elements = exact.features, exact.head_sizes, exact.max_elements
        self.prefers_split_backward = exact.prefers_split_backward
        self.rounds_per_query_head = exact.rounds_per_query_head
        self._is_said = False

    def unsupported_reason(self, q: Tensor, spec: AttentionSpec) -> str | None:
        """As the exact kernel's, and heads must be of size 128, in bfloat16, on Hopper."""
        reason = self._exact.unsupported_reason(q, spec)
        if reason is None and q.shape[-1] != HEAD_SIZE:
            reason = f"it takes head size {HEAD_SIZE}, found {q.shape[-1]}"
        if reason is None and q.is_cuda:
            if q.dtype != torch.bfloat16:
                reason = f"it takes torch.bfloat16, the tensors are {q.dtype}"
            elif torch.cuda.get_device_capability(q.device)[0] != HOPPER:
                reason = f"it needs compute capability {HOPPER}, this GPU has {torch.cuda.get_device_capability()}"
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Long segments in blocks, all others by the exact kernel."""
        if spec.window is not None or spec.softcap:
            return attention_forward(self._exact, q, k, v, spec)
        if spec.segments is None:
            if not self._is_long(k.shape[1]):
                return attention_forward(self._exact, q, k, v, spec)
            return self._long(q, k, v, spec)
        places = segment_slices(spec.segments)
        if not any(self._is_long(keys.stop - keys.start) for _, keys in places):
            return attention_forward(self._exact, q, k, v, spec)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        for rows, keys, inner in self._runs(places, spec):
            far = inner.segments is None and self._is_long(keys.stop - keys.start)
            part = q[:, rows], k[:, keys], v[:, keys], inner
            out[:, rows], lse[:, :, rows] = self._long(*part) if far else attention_forward(self._exact, *part)
        return out, lse

    def _is_long(self, keys: int) -> bool:
        """Whether a call of so many keys is worth its blocks."""
        return keys >= 2 * self._queries

    def _runs(self, places: list[tuple[slice, slice]], spec: AttentionSpec) -> list[tuple[slice, slice, AttentionSpec]]:
        """Long segments one by one, and what lies between them as one call each."""
        runs: list[tuple[slice, slice, AttentionSpec]] = []
        short: list[tuple[slice, slice]] = []

        def close() -> None:
            if short:
                rows = slice(short[0][0].start, short[-1][0].stop)
                keys = slice(short[0][1].start, short[-1][1].stop)
                q = (0, *(place.stop - rows.start for place, _ in short))
                k = (0, *(place.stop - keys.start for _, place in short))
                runs.append((rows, keys, spec.with_segments(VarlenSegments(q, k))))
                short.clear()

        for rows, keys in places:
            if self._is_long(keys.stop - keys.start) or (short and short[-1][1].stop != keys.start):
                close()  # keys of a segment without queries lie between two calls
            if self._is_long(keys.stop - keys.start):
                runs.append((rows, keys, spec.one_segment()))
            else:
                short.append((rows, keys))
        close()
        return runs

    def _long(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """One segment: (B, n, H, D) queries against (B, T, K, D) keys, causal at the bottom right or all of them."""
        if not self._is_said:  # not when it is made: kernels that are only listed are made too
            log.info("attention's forward pass takes far keys in FP8 (%s): results are not exact", self.name)
            self._is_said = True
        before = k.shape[1] - q.shape[1] if spec.causal else k.shape[1]  # keys that the first query surely sees
        most = k.shape[1] // TILE * TILE
        quantised = quantise_keys(k[:, :most], v[:, :most])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        for start in range(0, q.shape[1], self._queries):
            stop = min(start + self._queries, q.shape[1])
            rows = q[:, start:stop]
            count = (before + start if spec.causal else before) // TILE * TILE  # keys in FP8
            end = k.shape[1] - q.shape[1] + stop if spec.causal else k.shape[1]
            padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % TILE))
            sums = torch.zeros(padded.shape, dtype=torch.float32, device=q.device)
            log_sums = torch.full(
                (q.shape[0], q.shape[2], padded.shape[1]), -torch.inf, dtype=torch.float32, device=q.device
            )
            if count:
                merge_keys(self._blocks, sums, log_sums, padded, quantised, count, spec.scale, self._keys)
            sums, log_sums = sums[:, : rows.shape[1]], log_sums[:, :, : rows.shape[1]].contiguous()
            if end > count:
                near = attention_forward(self._exact, rows, k[:, count:end], v[:, count:end], spec.one_segment())
                merge_into(sums, log_sums, near[0], near[1].float())
            out[:, start:stop], lse[:, :, start:stop] = sums.to(out.dtype), log_sums
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The exact kernel's."""
        return self._exact.backward(dout, q, k, v, out, lse, spec)

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
        """The exact kernel's."""
        return self._exact.backward_accumulate(dout, q, k, v, out, lse, spec, dk, dv)

    def backward_with_partials(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor, list[PartialKVGrad]]:
        """The exact kernel's."""
        return self._exact.backward_with_partials(dout, q, k, v, out, lse, spec)
