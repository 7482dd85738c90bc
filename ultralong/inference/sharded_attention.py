"""Attention of new tokens with themselves and with all that the KV cache holds, on any number of ranks.

B batch, T tokens of this rank, P ranks, H query heads, K kv heads, G = H / K, D head size, n tokens held here.

A prompt is read in chunks. Each rank takes its part of every chunk (zigzag, so that causal work is equal) and keeps the
keys and values of its part: the cache is sharded by tokens, for any number of heads. Attention of a chunk is two
softmaxes joined by their log-sum-exp:

* among the chunk's own tokens, by the training scheme `gathered` (`ultralong.attention.gathered`);
* with the cache: every rank attends with all queries of the chunk to the keys that it holds, and the partial results
  travel to the queries' owners. Queries travel, the cache never does: a chunk costs the same exchange whether ten
  tokens or a million came before. Under a sliding window only the keys within its reach are read.

A single new token is computed by every rank alike, and attends in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ultralong.attention.collectives import Group, all_gather, all_to_all
from ultralong.attention.gathered import Gathered
from ultralong.attention.kernels import Kernel, attention_forward, available_kernels, choose_kernel, get_kernel
from ultralong.attention.layout import Layout, merge_adjacent, zigzag
from ultralong.attention.lse_merge import accumulation_dtype, add_sink, merge_into
from ultralong.attention.ring.plan import blocks_seen
from ultralong.attention.scheme import Local, OutLse, Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.inference.kv_cache import KvCache, Range

WIDENED_BYTES = 2**30  # of keys and values that are widened from fp8 at once
WIDENED_TOKENS = 2**16  # likewise, where a single new token reads them


class ShardedAttention:
    """The `attention_context` of a model that reads with a KV cache: attends, and stores keys and values.

    One forward pass of the model stands between `begin` and `end`.

    Args:
        cache: This rank's part of the cache.
        group: The ranks that share the sequence; None is this one alone.
        kernel: Name of the attention kernel, or `auto`.
    """

    def __init__(self, cache: KvCache, group: Group | None = None, kernel: str = "auto") -> None:
        self.cache, self.group, self.kernel = cache, group, kernel
        self._layout: Layout | None = None
        self._scheme: Scheme | None = None
        self._tokens = 0
        self._counts = [0] * cache.ranks  # tokens that each rank holds before this pass
        self._new: list[list[Range]] = []  # for each rank the ranges of the pass that it will hold, without padding

    def begin(self, tokens: int) -> None:
        """Start a pass of this many tokens: a chunk, or one token that every rank has."""
        self._tokens, self._scheme, self._counts = tokens, None, self.cache.held()
        self._layout = zigzag(tokens, self.cache.ranks) if tokens > 1 else None
        self._new = self._new_ranges()

    def shard(self, x: Tensor) -> Tensor:
        """This rank's part (B, T) of the pass's ids (B, tokens), padded at the end."""
        return x if self._layout is None else self._layout.shard(x, self.cache.rank)

    def positions(self, device: torch.device) -> Tensor:
        """Positions (1, T) of this rank's part in the sequence."""
        local = torch.zeros(1, dtype=torch.long) if self._layout is None else self._layout.positions(self.cache.rank)
        # Padding gets the last token's: RoPE may take the text's length from the largest.
        return (local.clamp(max=self._tokens - 1) + self.cache.length)[None].to(device)

    def last(self) -> tuple[int, int]:
        """The rank that has the pass's last token, and the token's place among that rank's."""
        if self._layout is None:
            return 0, 0
        for rank in range(self.cache.ranks):
            place = (self._layout.positions(rank) == self._tokens - 1).nonzero()
            if len(place):
                return rank, int(place[0])
        raise AssertionError("every token has an owner")

    def place(self) -> tuple[int, int, bool]:
        """Of a pass over one token: its position, the tokens held here before, and whether it will be held here."""
        return self.cache.length, self._counts[self.cache.rank], bool(self._new[self.cache.rank])

    def shares(self) -> list[int]:
        """How many of the pass's tokens each rank will hold."""
        return [sum(stop - start for start, stop in ranges) for ranges in self._new]

    def end(self) -> None:
        """Finish a pass: its tokens are held."""
        self.cache.append(self._tokens, self._new)

    def _new_ranges(self) -> list[list[Range]]:
        if self._layout is None:
            owner = min(range(self.cache.ranks), key=lambda rank: (self._counts[rank], rank))
            return [[(0, 1)] if rank == owner else [] for rank in range(self.cache.ranks)]
        return [
            [(start, min(stop, self._tokens)) for start, stop in self._layout.ranges(rank) if start < self._tokens]
            for rank in range(self.cache.ranks)
        ]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attention of the pass's tokens with themselves and all before; called by each layer.

        Args:
            q: (B, T, H, D).
            k: (B, T, K, D).
            v: (B, T, K, D).
            scale: Factor on scores, 1 / sqrt(D) by default.
            window: Sliding window in tokens, the query's own included.
            softcap: Scores become softcap * tanh(score / softcap).
            sink: (H,) logits of one more key with value zero.
            layer: The layer's number.

        Returns:
            (B, T, H, D).

        Raises:
            ValueError: A full cache.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        spec = AttentionSpec(scale=scale, window=window, softcap=softcap or None)
        out, lse = (self._token if self._layout is None else self._chunk)(q, k, v, spec, layer)
        if sink is not None:
            out, lse = add_sink(out, lse, sink)
        return out.to(q.dtype)

    def _write(self, k: Tensor, v: Tensor, layer: int) -> int:
        """Store what this rank will hold of the pass; how many tokens that is."""
        mine = self.shares()[self.cache.rank]
        if mine:
            self.cache.write(layer, self._counts[self.cache.rank], k[:, :mine], v[:, :mine])
        return mine

    def _token(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layer: int) -> OutLse:
        """One token, the same everywhere: each rank attends to what it holds, all merge all results."""
        hidden, count = self._beyond(spec.window), self._counts[self.cache.rank] + self._write(k, v, layer)
        part = self._with_cache(q, spec.non_causal(), layer, slice(hidden[self.cache.rank], count))
        if self.group is None:
            return part
        dtype = accumulation_dtype(q.dtype)
        part = part[0].to(dtype), part[1]  # a rank that read its keys in pieces has it so already: all must send alike
        out, lse = torch.zeros_like(q, dtype=dtype), q.new_full((q.shape[0], q.shape[2], 1), float("-inf"), dtype=dtype)
        outs, lses = (all_gather(x.contiguous(), self.group).wait() for x in part)
        for rank in range(self.cache.ranks):
            if self._counts[rank] > hidden[rank] or self._new[rank]:
                merge_into(out, lse, outs[rank], lses[rank])
        return out, lse

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layer: int) -> OutLse:
        """The chunk's own tokens, then what was there before."""
        if self._scheme is None:
            kernel = choose_kernel(self.kernel, q, spec, bottom_right=self.cache.ranks > 1)
            assert self._layout is not None
            self._scheme = Local(kernel) if self.group is None else Gathered(self.group, self._layout, kernel)
        out, lse = self._scheme.attend(q, k, v, spec)
        if self.cache.length:
            out = out.to(accumulation_dtype(q.dtype))
            for part, part_lse in self._past(q, spec, layer):
                merge_into(out, lse, part, part_lse)
        self._write(k, v, layer)
        return out, lse

    def _past(self, q: Tensor, spec: AttentionSpec, layer: int) -> Iterator[OutLse]:
        """Results (B, T, H, D) and (B, H, T) of this rank's queries with each rank's part of the cache."""
        hidden, own = self._beyond(spec.window), self.cache.rank
        if self.group is None:
            yield self._of_ranks(q, spec, layer, [own])
            return
        gathered = all_gather(q.contiguous(), self.group).wait()  # (P, B, T, H, D)
        rows = gathered.transpose(0, 1).flatten(1, 2)  # (B, P T, H, D)
        out, lse = self._of_ranks(rows, spec, layer, range(self.cache.ranks))
        outs = out.unflatten(1, (self.cache.ranks, -1)).transpose(0, 1).contiguous()  # (P, B, T, H, D)
        lses = lse.unflatten(2, (self.cache.ranks, -1)).permute(2, 0, 1, 3).contiguous()  # (P, B, H, T)
        arriving = all_to_all(outs, self.group), all_to_all(lses, self.group)
        for rank, pair in enumerate(zip(*(pending.wait() for pending in arriving), strict=True)):
            if self._counts[rank] > hidden[rank]:
                yield pair

    def _beyond(self, window: int | None) -> list[int]:
        """How many of its first tokens each rank holds that no query of the pass sees."""
        return self.cache.held(0 if window is None else max(0, self.cache.length - window + 1))

    def _of_ranks(self, q: Tensor, spec: AttentionSpec, layer: int, ranks: Sequence[int]) -> OutLse:
        """Queries (B, R T, H, D) of some ranks with what this one holds; of weight zero where they see none of it."""
        if spec.window is None:
            return self._with_cache(q, spec.non_causal(), layer, slice(0, self._counts[self.cache.rank]))
        assert self._layout is not None
        length, hidden = self.cache.length, self._beyond(spec.window)[self.cache.rank]
        held = merge_adjacent(self.cache.ranges(max(0, length - spec.window + 1)))
        out, lse = self._nothing(q)
        for place, rank in enumerate(ranks):
            mine = [(length + start, length + stop) for start, stop in self._layout.ranges(rank)]
            for rows, keys, cut in blocks_seen(mine, held, None, spec.window):
                first = place * self._layout.local + rows.start
                at, keys = slice(first, first + rows.stop - rows.start), slice(hidden + keys.start, hidden + keys.stop)
                part, part_lse = self._with_cache(q[:, at], spec.non_causal(cut), layer, keys)
                merge_into(out[:, at], lse[:, :, at], part, part_lse)
        return out, lse

    def _nothing(self, q: Tensor) -> OutLse:
        """The result (B, T, H, D) of queries that have seen no key, and its log-sum-exp."""
        dtype = accumulation_dtype(q.dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype)
        return torch.zeros_like(q, dtype=dtype), lse

    def _with_cache(self, q: Tensor, spec: AttentionSpec, layer: int, keys: slice) -> OutLse:
        """Every query (B, T, H, D) with tokens held here; nothing, with weight zero, where there are none."""
        out, lse = self._nothing(q)
        if keys.start == keys.stop:
            return out.to(q.dtype), lse
        if q.shape[1] == 1:
            return self._one_query(q, spec, layer, keys)
        kernel = choose_kernel(self.kernel, q, spec, bottom_right=True)
        if self.cache.kv == "auto":
            return attention_forward(kernel, q, *self.cache.read(layer, keys), spec)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads, of_query in self._head_groups(q, layer, keys.stop - keys.start):
            k, v = self.cache.read(layer, keys, heads)
            out[:, :, of_query], lse[:, of_query] = attention_forward(kernel, q[:, :, of_query], k, v, spec)
        return out, lse

    def _head_groups(self, q: Tensor, layer: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Kv heads and their query heads, few enough that widened keys and values stay small."""
        batch, kv_heads, _, head_size = self.cache.layers[layer][0].values.shape
        group = q.shape[2] // kv_heads
        step = max(1, min(kv_heads, WIDENED_BYTES // (2 * batch * count * head_size * q.element_size())))
        for start in range(0, kv_heads, step):
            stop = min(start + step, kv_heads)
            yield slice(start, stop), slice(start * group, stop * group)

    def _one_query(self, q: Tensor, spec: AttentionSpec, layer: int, keys: slice) -> OutLse:
        """One query of each row. The query heads of a kv head stand as its queries, so that a key is read once."""
        _, kv_heads, _, head_size = self.cache.layers[layer][0].values.shape
        queries = q[:, 0].unflatten(1, (kv_heads, -1)).transpose(1, 2)  # (B, G, K, D)
        kernel = _decoding_kernel(q.device.type)
        kernel = get_kernel("reference") if kernel.unsupported_reason(queries, spec) else kernel
        step = kernel.max_elements // (kv_heads * head_size) if self.cache.kv == "auto" else WIDENED_TOKENS
        parts = (
            attention_forward(
                kernel, queries, *self.cache.read(layer, slice(start, min(start + step, keys.stop))), spec
            )
            for start in range(keys.start, keys.stop, step)
        )
        out, lse = next(parts)
        out = out if step >= keys.stop - keys.start else out.to(lse.dtype)
        for part, part_lse in parts:
            merge_into(out, lse, part, part_lse)
        return out.transpose(1, 2).flatten(1, 2)[:, None], lse.flatten(1, 2)[..., None]  # (B, 1, H, D), (B, H, 1)


@cache
def _decoding_kernel(device: str) -> Kernel:
    """The kernel for a single query, which must split the keys over the whole GPU: torch's flash kernel does."""
    return available_kernels(device).get("flash", get_kernel("reference"))
