"""The KV cache: keys and values of every layer, in the model's type or in fp8, on one GPU or sharded over several.

B batch, C capacity in tokens, t tokens, K kv heads, D head size, P ranks.

Buffers are allocated once, (B, K, C, D): heads outside, because one new token reads a whole head at a time. They grow
by `reserve` and forget by `truncate`. The tokens of a sequence are spread over the ranks; every rank knows which
ranges each of them holds. transformers' models, which call a cache of their own, get views of the same buffers
(`make_cache`).

In fp8 (float8 e4m3) each token has one scale for each head. It is a power of two, so that multiplying by it is exact
and the only loss is the rounding to 3 bits of mantissa, at most 1/16 of a number; and it belongs to one token, so that
tokens can be appended without touching those that are there. It costs 2 bytes for 128 of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

KV_TYPES = ("auto", "fp8")
FP8 = torch.float8_e4m3fn
# A number with exponent e is at most 2^e: scaled by 2^(8 - e) it is at most 256, below e4m3's largest, 448.
LARGEST_EXPONENT = 8
Range = tuple[int, int]  # tokens from the first number to before the second


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to fp8, with one scale for each vector.

    Args:
        x: (..., D) finite.

    Returns:
        (..., D) float8, and (..., 1) bfloat16 powers of two: their product is the rounded `x`.
    """
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True).float()).exponent - LARGEST_EXPONENT  # (..., 1)
    # In bfloat16 at once: a power that a device computes a little off becomes one of two again.
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-100, 100)).to(torch.bfloat16)
    return (x.float() / scale.float()).to(FP8), scale


@dataclass
class LayerBuffer:
    """Keys or values of one layer.

    Attributes:
        values: (B, K, C, D).
        scales: (B, K, C, 1) where the values are fp8, else None.
        dtype: Type in which they are read.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @classmethod
    def allocate(cls, like: Tensor, rows: int, capacity: int, kv: str) -> LayerBuffer:
        """An empty buffer of so many rows and tokens for tensors such as `like` (.., t, K, D)."""
        shape = (rows, like.shape[-2], capacity, like.shape[-1])
        # Zeros, since batched decoding multiplies what a row does not hold by a weight of zero: a NaN would stay.
        if kv == "auto":
            return cls(like.new_zeros(shape), None, like.dtype)
        scales = like.new_zeros((*shape[:3], 1), dtype=torch.bfloat16)
        return cls(like.new_zeros(shape, dtype=FP8), scales, like.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        """The values, and the scales where there are any."""
        return [self.values] if self.scales is None else [self.values, self.scales]

    def write(self, start: int, x: Tensor) -> None:
        """Store (B, t, K, D) at tokens `start` and after."""
        place = slice(start, start + x.shape[1])
        parts = (x,) if self.scales is None else quantize_fp8(x)
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor[:, :, place] = part.transpose(1, 2)

    def scatter(self, rows: Tensor, positions: Tensor, x: Tensor) -> None:
        """Store (n, K, D), each at its row and position (n,)."""
        parts = (x,) if self.scales is None else quantize_fp8(x)
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor[rows, :, positions] = part

    def read(self, tokens: slice, heads: slice) -> Tensor:
        """(B, t, k, D) of some tokens and heads, in the type they were stored from; a view unless they are fp8."""
        values = self.values[:, heads, tokens].transpose(1, 2)
        if self.scales is None:
            return values
        # Exact: 4 bits of mantissa times a power of two.
        scales = self.scales[:, heads, tokens].transpose(1, 2)
        return values.to(self.dtype).mul_(scales.to(self.dtype))

    def resized(self, capacity: int, held: int) -> LayerBuffer:
        """A buffer of another capacity with the first `held` tokens of this one."""
        made = [x.new_zeros((*x.shape[:2], capacity, x.shape[3])) for x in self.tensors]
        for new, old in zip(made, self.tensors, strict=True):
            new[:, :, :held] = old[:, :, :held]
        return LayerBuffer(made[0], made[1] if len(made) > 1 else None, self.dtype)


class KvCache:
    """The part of a KV cache that one rank holds, for all layers; buffers are allocated when a layer first writes.

    Args:
        capacity: Tokens of each sequence that this rank has room for.
        kv: `auto` stores the model's type, `fp8` takes half of bfloat16 (8 bits and a scale).
        ranks: Ranks P that the sequence is sharded over.
        rank: This one.

    Attributes:
        length: Tokens of the sequence, those of all ranks together.
        generation: Counts how often buffers were made or given back.

    Raises:
        ValueError: Another `kv`, or no room at all.
    """

    def __init__(self, capacity: int, kv: str = "auto", *, ranks: int = 1, rank: int = 0) -> None:
        if kv not in KV_TYPES:
            raise ValueError(f"Keys and values are kept as {' or '.join(KV_TYPES)}, got {kv!r}.")
        if capacity < 1:
            raise ValueError(f"A key-value cache must have room for at least one token, got {capacity}.")
        self.capacity, self.kv, self.ranks, self.rank = capacity, kv, ranks, rank
        self.layers: dict[int, list[LayerBuffer]] = {}
        self.length = self.generation = 0
        # For each rank the ranges of the sequence that it holds, rising.
        self._ranges: list[list[Range]] = [[] for _ in range(ranks)]
        self._held = [0] * ranks  # their tokens: every step asks, and each decoded token may be a range of its own

    def held(self, upto: int | None = None) -> list[int]:
        """How many of the first `upto` tokens (all by default) each rank holds."""
        if upto is None or upto >= self.length:
            return list(self._held)
        return [sum(max(0, min(stop, upto) - start) for start, stop in ranges) for ranges in self._ranges]

    def ranges(self, first: int) -> list[Range]:
        """Ranges of the sequence that this rank holds from token `first` on."""
        return [(max(start, first), stop) for start, stop in self._ranges[self.rank] if stop > first]

    def append(self, tokens: int, ranges: Sequence[Sequence[Range]] | None = None) -> None:
        """Count tokens that all layers have written now.

        Args:
            tokens: Their number over all ranks.
            ranges: For each rank those that it holds, counted from the first new token; None: the first rank has all.
        """
        new = [[(0, tokens)], *([] for _ in range(self.ranks - 1))] if ranges is None else ranges
        for rank, added in enumerate(new):
            self._ranges[rank].extend((start + self.length, stop + self.length) for start, stop in added)
            self._held[rank] += sum(stop - start for start, stop in added)
        self.length += tokens

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; the buffers stay."""
        self._held = self.held(tokens)
        self._ranges = [[(start, min(stop, tokens)) for start, stop in of if start < tokens] for of in self._ranges]
        self.length = min(self.length, tokens)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store keys and values (B, t, K, D) of a layer at this rank's tokens `start` and after.

        Raises:
            ValueError: They do not fit.
        """
        self.check_room(start + k.shape[1])
        for buffer, x in zip(self._buffers(layer, k, v, len(k)), (k, v), strict=True):
            buffer.write(start, x)

    def check_room(self, tokens: int) -> None:
        """See that this rank has room for so many tokens.

        Raises:
            ValueError: It has not.
        """
        if tokens > self.capacity:
            raise ValueError(
                f"The key-value cache holds {self.capacity:,} tokens and {tokens:,} were given: make it larger."
            )

    def scatter(self, layer: int, batch: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values (n, K, D) of a layer, each at its row of `batch` and its position (n,)."""
        for buffer, x in zip(self._buffers(layer, k, v, batch), (k, v), strict=True):
            buffer.scatter(rows, positions, x)

    def read(self, layer: int, tokens: slice, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values (B, t, k, D) of some of this rank's tokens and heads of a layer."""
        keys, values = self.layers[layer]
        return keys.read(tokens, heads), values.read(tokens, heads)

    def reserve(self, capacity: int) -> None:
        """Make room on this rank for `capacity` tokens, keeping what is held; nothing where there is room already.

        Where memory runs out, the capacity is the old one and all that was held can be read; to go on is to try again.
        """
        if capacity <= self.capacity:
            return
        self.generation += 1  # before any buffer goes: a graph may not read those that are gone
        held = self.held()[self.rank]
        for layer, pair in self.layers.items():
            # Only one layer is there twice, as a long cache is most of the memory; what has grown before an error stays
            # and serves too. Keys and values grow together: the fused step reads both by the keys' strides.
            if pair[0].values.shape[2] < capacity:
                self.layers[layer] = [buffer.resized(capacity, held) for buffer in pair]
        self.capacity = capacity

    def release(self) -> None:
        """Give the memory back; the cache is empty and can be filled again."""
        self.layers.clear()
        self.generation += 1
        self.truncate(0)

    @property
    def rows(self) -> int:
        """Sequences B that the buffers are for, 0 before the first write."""
        return next((len(keys.values) for keys, _ in self.layers.values()), 0)

    @property
    def bytes(self) -> int:
        """Memory of all buffers on this rank."""
        return sum(x.nbytes for pair in self.layers.values() for buffer in pair for x in buffer.tensors)

    def _buffers(self, layer: int, k: Tensor, v: Tensor, rows: int) -> list[LayerBuffer]:
        if layer not in self.layers:
            self.generation += 1
            self.layers[layer] = [LayerBuffer.allocate(x, rows, self.capacity, self.kv) for x in (k, v)]
        return self.layers[layer]


class CacheLayer(DynamicLayer):
    """One layer of a `KvCache` as transformers' models use it: what they get are views of its filled part.

    A `StaticLayer` returns the whole buffer and needs a mask over it; this one costs the memory of its capacity and
    the attention of its length, and never copies what it holds.
    """

    def __init__(self, store: KvCache, index: int) -> None:
        super().__init__()
        self.store, self.index = store, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, K, t, D) behind the old and return all that is filled, (B, K, T, D).

        Raises:
            ValueError: They do not fit.
        """
        start = self.get_seq_length()
        self.store.write(self.index, start, key_states.transpose(1, 2), value_states.transpose(1, 2))
        if not self.is_initialized:  # only now: memory may not hold the buffers, and `show` reads what is initialized
            self.lazy_initialization(key_states, value_states)
        return self.show(start + key_states.shape[2])

    def show(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Let the views be those of the first tokens, (B, K, tokens, D); the layer has been written."""
        keys, values = (x.transpose(1, 2) for x in self.store.read(self.index, slice(tokens)))
        self.keys, self.values = keys, values
        return keys, values


class ModelCache(Cache):
    """A `KvCache` in the form that a transformers model takes as `past_key_values`.

    Args:
        store: Where keys and values are.
        layers: Decoder layers of the model.
    """

    def __init__(self, store: KvCache, layers: int) -> None:
        self.store = store
        super().__init__(layers=[CacheLayer(store, index) for index in range(layers)])

    def show(self, tokens: int) -> None:
        """Let every layer hold the first `tokens` tokens of its buffer: after `truncate` or `reserve` of the store."""
        for layer in self.layers:
            if isinstance(layer, CacheLayer) and layer.is_initialized:
                layer.show(tokens)


def has_plain_layers(model: PreTrainedModel) -> bool:
    """Whether every layer of a model attends to all tokens before, so that one kind of cache serves all."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    plain = getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
    return plain and all(kind == "full_attention" for kind in layer_types)


def make_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """A cache for `capacity` tokens that a transformers model takes as `past_key_values`.

    Models with sliding-window or other special layers get transformers' own growing cache, which knows them.
    """
    config = model.config.get_text_config()
    if has_plain_layers(model):
        return ModelCache(KvCache(capacity), config.num_hidden_layers)
    return DynamicCache(config=config)
