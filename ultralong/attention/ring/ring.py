"""Ring attention: queries stay, keys and values go round; partial results are merged by their log-sum-exp.

Legend: B batch, T tokens a rank holds, N tokens of a circulating block, P ranks, H query heads, K kv heads,
D head size.

Ring attention (arXiv 2310.01889) over the zigzag layout. While a rank computes with one block of K and V, it receives
the next one. Output, log-sum-exp and all gradients are accumulated in float32; the backward pass uses the merged pair,
so that every block's part of the gradients simply adds up. What other ranks add to a block's dK and dV travels one hop
behind the block and is back at its owner after P - 1 hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, Pending, copy_rows, ring_send_recv
from ultralong.attention.kernels import (
    Kernel,
    PartialKVGrad,
    attention_forward,
    backward_accumulate,
    backward_with_partials,
    partials_at,
)
from ultralong.attention.layout import Layout
from ultralong.attention.lse_merge import PartialRows, accumulation_dtype, merge
from ultralong.attention.protocol import OutLse
from ultralong.attention.ring.plan import Block, RingPlan
from ultralong.attention.scheme import Gradients, Scheme
from ultralong.attention.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class Ring(Scheme):
    """Attention of a rank's queries with keys and values that circulate.

    Attributes:
        group: The ranks of the ring.
        layout: Which tokens each holds.
        kernel: Who computes.
        boundaries: Document boundaries of the padded row when documents don't see each other, else None.
    """

    group: Group
    layout: Layout
    kernel: Kernel
    boundaries: tuple[int, ...] | None = None

    @cached_property
    def rank(self) -> int:
        """This process's place in the ring."""
        return dist.get_rank(self.group)

    @cached_property
    def _plans(self) -> dict[int | None, RingPlan]:
        return {}

    def plan(self, window: int | None) -> RingPlan:
        """This rank's plan under a sliding window (None without), made once."""
        if window not in self._plans:
            self._plans[window] = RingPlan(self.rank, self.layout, self.boundaries, window)
        return self._plans[window]

    def _block(self, plan: RingPlan, k: Tensor, v: Tensor) -> Tensor:
        """This rank's circulating keys and values, (2, B, N, K, D)."""
        block = k.new_empty((2, k.shape[0], plan.tokens(0), *k.shape[2:]))
        for side, x in zip(block, (k, v), strict=True):
            offset = 0
            for at in plan.own_circulating:
                copy_rows(side[:, offset : offset + at.stop - at.start], x[:, at])
                offset += at.stop - at.start
        return block

    def _rotate(self, plan: RingPlan, x: Tensor, hop: int, tag: int = 0) -> Pending:
        """Send a block (or its gradients) to the next rank, receive the previous one's, which has made `hop` hops."""
        return ring_send_recv(x, self.group, tag, (*x.shape[:2], plan.tokens(hop), *x.shape[3:]))

    def _merge(self, plan: RingPlan, x: Tensor) -> PartialRows:
        """The result of a rank's own tokens (B, T, H, D), to which blocks are added."""
        return PartialRows(x, plan.merged_rows, x.dtype if plan.merged_once else accumulation_dtype(x.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> OutLse:
        """The pair's lse is (B, H, T)."""
        plan = self.plan(spec.window)
        receiving = self._rotate(plan, self._block(plan, k, v), 1) if plan.blocks else None
        out, lse = attention_forward(self.kernel, q, k, v, spec.with_segments(plan.segments))
        merged, lse = self._merge(plan, out), lse.contiguous()

        def add(visible: list[Block], keys: Tensor, values: Tensor) -> None:
            for rows, at, window in visible:
                part, part_lse = attention_forward(
                    self.kernel, q[:, rows], keys[:, at], values[:, at], spec.non_causal(window)
                )
                merged.set(rows, merge(merged.at(rows), lse[:, :, rows], part, part_lse))

        add(plan.own_blocks, k, v)
        for hop, visible in enumerate(plan.blocks, start=1):
            assert receiving is not None
            block = receiving.wait()
            receiving = self._rotate(plan, block, hop + 1) if hop < len(plan.blocks) else None
            add(visible, block[0], block[1])
        return merged.result(), lse

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        *,
        fp32_grads: bool = False,
    ) -> Gradients:
        """The blocks go round the ring again; their gradients follow one hop behind."""
        plan = self.plan(spec.window)
        receiving = self._rotate(plan, self._block(plan, k, v), 1) if plan.blocks else None
        own, grads_behind = spec.with_segments(plan.segments), None
        if fp32_grads:
            dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
            dq = backward_accumulate(self.kernel, dout, q, k, v, out, lse, own, dk, dv)
            partials = [(slice(0, k.shape[1]), dk, dv)]
        else:
            dq, dk, dv, partials = backward_with_partials(self.kernel, dout, q, k, v, out, lse, own)
        merged = self._merge(plan, dq)

        def add(seen: Block, keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
            rows, spec_of_block = seen.rows, spec.non_causal(seen.window)
            tensors = (dout[:, rows], q[:, rows], keys, values, out[:, rows], lse[:, :, rows])
            merged.at(rows).add_(backward_accumulate(self.kernel, *tensors, spec_of_block, to_keys, to_values))

        for seen in plan.own_blocks:
            to_keys, to_values = partials_at(partials, seen.keys)
            add(seen, k[:, seen.keys], v[:, seen.keys], to_keys, to_values)
        for hop, visible in enumerate(plan.blocks, start=1):
            assert receiving is not None
            block = receiving.wait()
            receiving = self._rotate(plan, block, hop + 1) if hop < len(plan.blocks) else None
            grads = torch.zeros_like(block, dtype=accumulation_dtype(k.dtype))
            for seen in visible:
                add(seen, *(x[:, seen.keys] for x in (*block, *grads)))
            if grads_behind is not None:
                grads += grads_behind.wait()
            grads_behind = self._rotate(plan, grads, hop + 1, tag=1)
        if grads_behind is not None:
            self._add_returned_grads(plan, grads_behind.wait(), partials)
        for place, to_keys, to_values in () if fp32_grads else partials:
            dk[:, place], dv[:, place] = to_keys, to_values
        return merged.result(), dk, dv

    def _add_returned_grads(self, plan: RingPlan, returned: Tensor, partials: list[PartialKVGrad]) -> None:
        """Add what the others computed for this rank's own keys and values, (2, B, N, K, D)."""
        offset = 0
        for at in plan.own_circulating:
            for total, grad in zip(partials_at(partials, at), returned, strict=True):
                total += grad[:, offset : offset + at.stop - at.start]
            offset += at.stop - at.start
