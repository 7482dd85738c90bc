"""PyTorch's blocked CPU kernel (the one under `scaled_dot_product_attention`), called so that it gives the log-sum-exp.

Legend: B batch, T tokens, H query heads, K kv heads, D head size. The operator takes (B, H, T, D) and aligns a causal
mask at the top left; `ultralong.attention.kernels.fallbacks` turns the calls it lacks into calls it has.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ultralong.attention.kernels.base import GQA, Kernel
from ultralong.attention.spec import AttentionSpec

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchCpu(Kernel):
    """torch's flash kernel on the CPU: no T x T matrix, float16 to float64."""

    name = "flash"
    device = "cpu"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    head_sizes = (2**16, 1)

    def __init__(self) -> None:
        self.features = frozenset({GQA} if _has_gqa() else {})

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """One operator call on transposed views."""
        out, lse = _forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, spec.causal, scale=spec.scale)
        return out.transpose(1, 2), lse  # (B, T, H, D), (B, H, T)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One operator call; the operator reads the log-sum-exp token by token, heads innermost."""
        statistic = lse.transpose(1, 2).contiguous().transpose(1, 2)
        grads = _backward(
            dout.transpose(1, 2),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            out.transpose(1, 2),
            statistic,
            0.0,
            spec.causal,
            scale=spec.scale,
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


@cache
def _has_gqa() -> bool:
    """Whether this torch's operator takes fewer kv heads than query heads, both ways."""
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8)
    try:
        out, lse = _forward(q, k, k, 0.0, True)
        return _backward(out, q, k, k, out, lse, 0.0, True)[1].shape == k.shape
    except RuntimeError:
        return False
