"""An attention kernel that allocates what a real one does and computes nothing: for fake tensors, and to count work.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ultralong.attention.kernels.base import GQA, Kernel
from ultralong.attention.kernels.flash_attn import FlashAttn2, FlashAttn3
from ultralong.attention.kernels.flash_attn_4 import FlashAttn4
from ultralong.attention.kernels.fp8 import Fp8Forward
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.kernels.torch_cuda import TorchCudnn, TorchEfficient, TorchFlash
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.attention.spec import AttentionSpec

KERNELS: dict[str, type[Kernel]] = {
    each.name: each for each in (FlashAttn4, FlashAttn3, FlashAttn2, TorchCudnn, TorchFlash, TorchEfficient, Reference)
}


def planned_kernel(name: str, packed: bool) -> str:
    """The kernel that a run is planned with: the named one, for `auto` the fastest of those that come with torch.

    The approximate `flash4_fp8` is planned as `flash4`, whose backward pass it has: its keys in FP8, a gibibyte a GPU
    for Llama-3.1-8B's million tokens on two, and the little that its forward pass saves are not counted.
    """
    if name == Fp8Forward.name:
        return FlashAttn4.name
    if name != "auto":
        return name
    return TorchFlash.name if packed else TorchCudnn.name


class AllocatingKernel(Kernel):
    """Allocates outputs, gradients and buffers as another kernel does, in calls of the kind that it takes.

    Attributes:
        flops_forward: FLOP of the forward calls so far.
        flops_backward: FLOP of the backward calls, 2.5 times the same calls' forward.
        calls: Kernel calls so far.
    """

    name = "allocating"
    device = "any"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})

    def __init__(self, like: str) -> None:
        """Take the features and limits of the kernel named `like`."""
        real = KERNELS[like]
        # cuDNN's features are looked up when it is made, which takes a GPU.
        self.features = frozenset({GQA}) if real is TorchCudnn else real.features
        self.head_sizes, self.max_elements = real.head_sizes, real.max_elements
        self.prefers_split_backward = real.prefers_split_backward
        self.rounds_per_query_head = real.rounds_per_query_head
        self.flops_forward = self.flops_backward = 0.0
        self.calls = 0

    def unsupported_reason(self, q: Tensor, spec: AttentionSpec) -> str | None:
        """None: whether the real kernel can compute a call is seen on the GPU."""
        return None

    def computes_in_fp32(self, q: Tensor) -> bool:
        """False, as on a GPU."""
        return False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Out (B, T_q, H, D) and lse (B, H, T_q)."""
        self.calls += 1
        self.flops_forward += 4.0 * _pairs(q, k, spec) * q.shape[0] * q.shape[2] * q.shape[3]
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, beside float32 buffers in which kernels add them over blocks, and sum_d dout * out.

        Those of K and V are added over the query heads of a group; without groups a block of keys is done at once.
        """
        self.calls += 1
        self.flops_backward += 10.0 * _pairs(q, k, spec) * q.shape[0] * q.shape[2] * q.shape[3]
        summed = (q, k, v) if q.shape[2] != k.shape[2] else (q,)
        buffers = [x.new_empty(x.shape, dtype=torch.float32) for x in summed]
        delta = torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        del buffers, delta
        return dq, dk, dv


def _pairs(q: Tensor, k: Tensor, spec: AttentionSpec) -> float:
    """Query-key pairs of a call and one head, T^2 / 2 for a causal square as everywhere in this project."""
    edges = spec.segments
    queries, keys = ((0, q.shape[1]), (0, k.shape[1])) if edges is None else (edges.q, edges.k)
    return sum(_seen(b - a, d - c, spec) for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True))


def _seen(queries: int, keys: int, spec: AttentionSpec) -> float:
    seen = keys - queries / 2 if spec.causal else float(keys)  # in the mean
    return queries * (seen if spec.window is None else min(seen, spec.window))
