"""The interface that every attention kernel fills, and what a kernel says it can do.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ultralong.attention.spec import AttentionSpec

GQA = "gqa"  # fewer kv heads than query heads, without copying them
VARLEN = "varlen"  # segments of a packed row in one call
BOTTOM_RIGHT = "bottom_right"  # causal with more keys than queries
WINDOW = "window"  # sliding window
SOFTCAP = "softcap"  # capped scores

ANY_ELEMENTS = 2**62
PartialKVGrad = tuple[slice, Tensor, Tensor]  # keys, and partial dK and dV (B, n, K, D) in the accumulation dtype


def partials_at(partials: list[PartialKVGrad], place: slice) -> list[Tensor]:
    """Partial dK and dV (B, n, K, D) of a range of keys, as views to be read or added to.

    Raises:
        LookupError: None holds the whole range.
    """
    for keys, *sums in partials:
        if keys.start <= place.start and place.stop <= keys.stop:
            return [x[:, place.start - keys.start : place.stop - keys.start] for x in sums]
    held = ", ".join(f"{keys.start} to {keys.stop}" for keys, *_ in partials) or "none"
    raise LookupError(f"keys {place.start} to {place.stop} have no partial gradients; there are {held}")


class Kernel(ABC):
    """One attention kernel: `(q, k, v, spec) -> (out, lse)` and its backward from the saved pair.

    Shapes: q, out and their gradients (B, T_q, H, D); k, v and their gradients (B, T_k, K, D); lse (B, H, T_q) in
    float32 (float64 for float64 input), natural logarithm. A call with segments (`spec.segments`) has B = 1.
    `backward` takes any pair (out, lse): one merged from several calls gives this call's part of the gradients.

    Attributes:
        name: What users ask for.
        device: "cpu" or "cuda".
        dtypes: Types it takes.
        features: Which of the constants above it has; `ultralong.attention.kernels.fallbacks` makes up for a missing
            GQA, VARLEN, BOTTOM_RIGHT or WINDOW; soft caps are refused.
        head_sizes: Largest head size, and what the size must be divisible by.
        max_elements: Largest tensor that it indexes rightly.
        splits_backward: Whether the backward pass of a causal call with more keys than queries is faster as a square
            and a full rectangle, whose dq are added.
        rounds_heads: Whether, of grouped heads, it rounds each query head's part of dk and dv before it adds them.
        approximate: Whether its results differ from exact attention by more than rounding; `auto` takes no such one.
    """

    name: ClassVar[str]
    device: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float16, torch.bfloat16})
    features: frozenset[str] = frozenset()
    head_sizes: tuple[int, int] = (256, 8)
    max_elements: int = ANY_ELEMENTS
    prefers_split_backward: bool = False
    rounds_per_query_head: bool = False
    approximate: ClassVar[bool] = False

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Attention output and log-sum-exp."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""

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
        """Adds the gradients of k and v to `dk` and `dv` (float32; float64 for float64 input), returns that of q.

        A kernel that can adds them unrounded; this one adds what `backward` gives.
        """
        dq, to_keys, to_values = self.backward(dout, q, k, v, out, lse, spec)
        dk += to_keys
        dv += to_values
        return dq

    def backward_with_partials(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor, list[PartialKVGrad]]:
        """`backward` of packed segments (one row), and partial gradients of those that are marked as shared.

        A kernel that can gives them unrounded; this one gives what `backward` gives.
        """
        assert spec.segments is not None
        assert spec.segments.shared is not None
        dq, dk, dv = self.backward(dout, q, k, v, out, lse, spec)
        fp32 = torch.promote_types(k.dtype, torch.float32)
        places = [slice(*spec.segments.k[segment : segment + 2]) for segment in sorted(spec.segments.shared)]
        return dq, dk, dv, [(place, dk[:, place].to(fp32), dv[:, place].to(fp32)) for place in places]

    def computes_in_fp32(self, q: Tensor) -> bool:
        """Whether calls in a 16-bit type are widened to float32 and their parts added unrounded.

        It costs nothing on a CPU, where 16-bit types are no faster.
        """
        return q.device.type == "cpu" and q.dtype.itemsize == 2

    def unsupported_reason(self, q: Tensor, spec: AttentionSpec) -> str | None:
        """Why this kernel can't compute this call, or None when it can."""
        largest, multiple = self.head_sizes
        if q.device.type != self.device:
            return f"it runs on {self.device}, the tensors are on {q.device.type}"
        if q.dtype not in self.dtypes:
            return f"it takes {', '.join(sorted(str(d) for d in self.dtypes))}, the tensors are {q.dtype}"
        if q.shape[-1] > largest or q.shape[-1] % multiple:
            return f"it takes head sizes up to {largest} divisible by {multiple}, found {q.shape[-1]}"
        if spec.softcap and SOFTCAP not in self.features:
            return f"it has no soft cap on scores, asked for {spec.softcap}"
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"
