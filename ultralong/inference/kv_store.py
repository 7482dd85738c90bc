"""Keys and values of one process, for every layer, in buffers made once: as they come, or in 8 bits.

B batch, C capacity in tokens, t tokens, K kv heads, D head size.

In 8 bits (float8 e4m3) each token has one scale a head. It is a power of two, so that multiplying by it is exact and
the only loss is the rounding to 3 bits of mantissa, at most 1/16 of a number; and it belongs to one token, so that
tokens can be added one by one without touching those that are there. It costs 2 bytes for 128. What attention reads is
widened for a few heads at a time, never for the whole cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KV_TYPES = ("auto", "fp8")
EIGHT_BITS = torch.float8_e4m3fn
# A number with exponent e is at most 2^e: scaled by 2^(8 - e) it is at most 256, below e4m3's largest, 448.
LARGEST_EXPONENT = 8


def to_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 8 bits, with a scale for each vector.

    Args:
        x: (..., D) finite.

    Returns:
        (..., D) float8, and (..., 1) bfloat16 powers of two: their product is the rounded `x`.
    """
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True).float()).exponent - LARGEST_EXPONENT  # (..., 1)
    # In bfloat16 at once: a power that a device computes a little off becomes one of two again.
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-100, 100)).to(torch.bfloat16)
    return (x.float() / scale.float()).to(EIGHT_BITS), scale


@dataclass
class Buffer:
    """Keys or values of one layer.

    Attributes:
        values: (B, C, K, D).
        scales: (B, C, K, 1) where the values are 8-bit, else None.
        dtype: Type in which they are read.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @classmethod
    def make(cls, like: Tensor, capacity: int, kv: str) -> Buffer:
        """An empty buffer for tensors such as `like` (B, t, K, D)."""
        shape = (like.shape[0], capacity, *like.shape[2:])
        if kv == "auto":
            return cls(like.new_empty(shape), None, like.dtype)
        return cls(
            torch.empty(shape, dtype=EIGHT_BITS, device=like.device),
            torch.empty((*shape[:3], 1), dtype=torch.bfloat16, device=like.device),
            like.dtype,
        )

    def write(self, start: int, x: Tensor) -> None:
        """Put (B, t, K, D) at tokens `start` and after."""
        place = slice(start, start + x.shape[1])
        if self.scales is None:
            self.values[:, place] = x
        else:
            self.values[:, place], self.scales[:, place] = to_eight_bits(x)

    def read(self, tokens: slice, heads: slice) -> Tensor:
        """(B, t, k, D) of some tokens and heads, in the type they came in."""
        values = self.values[:, tokens, heads]
        if self.scales is None:
            return values
        # Exact: 4 bits of mantissa times a power of two.
        return values.to(self.dtype).mul_(self.scales[:, tokens, heads].to(self.dtype))


class KvStore:
    """The buffers of all layers, made when a layer first writes.

    Args:
        capacity: Tokens to make room for.
        kv: `auto` keeps the model's type, `fp8` takes half of it (8 bits and a scale).

    Raises:
        ValueError: Another `kv`, or no room at all.
    """

    def __init__(self, capacity: int, kv: str = "auto") -> None:
        if kv not in KV_TYPES:
            raise ValueError(f"Keys and values are kept as {' or '.join(KV_TYPES)}, got {kv!r}.")
        if capacity < 1:
            raise ValueError(f"A key-value cache must have room for at least one token, got {capacity}.")
        self.capacity, self.kv = capacity, kv
        self.layers: dict[int, tuple[Buffer, Buffer]] = {}

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values (B, t, K, D) of a layer at tokens `start` and after.

        Raises:
            ValueError: They do not fit.
        """
        if start + k.shape[1] > self.capacity:
            raise ValueError(
                f"The key-value cache holds {self.capacity:,} tokens and {start + k.shape[1]:,} were "
                "given: make it larger."
            )
        if layer not in self.layers:
            self.layers[layer] = Buffer.make(k, self.capacity, self.kv), Buffer.make(v, self.capacity, self.kv)
        for buffer, x in zip(self.layers[layer], (k, v), strict=True):
            buffer.write(start, x)

    def read(self, layer: int, tokens: slice, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (B, t, k, D) of some tokens and heads of a layer."""
        keys, values = self.layers[layer]
        return keys.read(tokens, heads), values.read(tokens, heads)

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        tensors = [x for pair in self.layers.values() for buffer in pair for x in (buffer.values, buffer.scales)]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)
