"""Attention of new tokens with themselves and with all that a cache holds, shared out over any number of processes.

B batch, T tokens of this process, P processes, H query heads, K kv heads, D head size, n tokens held here.

A prompt is read in chunks. Each process takes its part of every chunk (zigzag, so that causal work is equal) and keeps
the keys and values of its part: the cache is shared out by tokens, for any number of heads. Attention of a chunk is
two softmaxes joined by their log-sum-exp:

* among the chunk's own tokens, by the training scheme `gathered` (`ultralong.attention.gathered`);
* with the cache: every process attends with all queries of the chunk to the keys that it holds, and the partial
  results travel to the queries' owners. Queries travel, the cache never does: a chunk costs the same exchange whether
  ten tokens or a million came before.

A single new token is computed by every process alike, and attends in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group, all_gather, all_to_all
from ultralong.attention.gathered import Gathered
from ultralong.attention.kernels import attention_forward, choose_kernel, get_kernel
from ultralong.attention.layout import Layout, zigzag
from ultralong.attention.lse_merge import accumulation_dtype, add_sink, merge_into
from ultralong.attention.scheme import Local, OutLse, Scheme
from ultralong.attention.spec import AttentionSpec
from ultralong.inference.kv_store import KvStore

BYTES_AT_ONCE = 2**30  # widened keys and values
KEYS_AT_ONCE = 2**16  # keys that a single new token looks at in one step


class CachedAttention:
    """What a model is given as `attention_context`: attends, and keeps keys and values.

    One pass of the model stands between `begin` and `end`.

    Args:
        store: Where this process keeps keys and values.
        group: The processes that share the row; None is this one alone.
        kernel: Name of the kernel, or `auto`.
    """

    def __init__(self, store: KvStore, group: Group | None = None, kernel: str = "auto") -> None:
        self.store, self.group, self.kernel = store, group, kernel
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.length = 0
        # For each process the ranges of the row that it holds, rising: all know all.
        self._held: list[list[tuple[int, int]]] = [[] for _ in range(self.ranks)]
        self._layout: Layout | None = None
        self._scheme: Scheme | None = None
        self._tokens = 0
        self.counts = [0] * self.ranks

    def held(self, upto: int | None = None) -> list[int]:
        """How many of the row's first `upto` tokens (all by default) each process holds."""
        end = self.length if upto is None else upto
        return [sum(max(0, min(stop, end) - start) for start, stop in ranges) for ranges in self._held]

    def keep_first(self, tokens: int) -> None:
        """Forget all but the row's first tokens; the buffers stay."""
        self._held = [[(start, min(stop, tokens)) for start, stop in ranges if start < tokens] for ranges in self._held]
        self.length = tokens

    def begin(self, tokens: int) -> None:
        """Go on with this many tokens: a chunk, or one token that every process has."""
        self._tokens, self._scheme, self.counts = tokens, None, self.held()
        self._layout = zigzag(tokens, self.ranks) if tokens > 1 else None

    def shard(self, x: Tensor) -> Tensor:
        """This process's part (B, T) of the chunk's ids (B, tokens), padded at the end."""
        return x if self._layout is None else self._layout.shard(x, self.rank)

    def positions(self, device: torch.device) -> Tensor:
        """Places (1, T) in the row of this process's part."""
        local = torch.zeros(1, dtype=torch.long) if self._layout is None else self._layout.positions(self.rank)
        return (local + self.length)[None].to(device)

    def last(self) -> tuple[int, int]:
        """Who holds the chunk's last token, and where among its own."""
        if self._layout is None:
            return 0, 0
        for rank in range(self.ranks):
            place = (self._layout.positions(rank) == self._tokens - 1).nonzero()
            if len(place):
                return rank, int(place[0])
        raise AssertionError("every token has an owner")

    def end(self) -> None:
        """The pass is over: its tokens are held."""
        for rank, pieces in enumerate(self._new_pieces()):
            self._held[rank] += [(start + self.length, stop + self.length) for start, stop in pieces]
        self.length += self._tokens

    def _new_pieces(self) -> list[list[tuple[int, int]]]:
        """For each process the ranges of the chunk that it will hold, padding left out."""
        if self._layout is None:
            owner = min(range(self.ranks), key=lambda rank: (self.counts[rank], rank))
            return [[(0, 1)] if rank == owner else [] for rank in range(self.ranks)]
        return [
            [(start, min(stop, self._tokens)) for start, stop in self._layout.ranges(rank) if start < self._tokens]
            for rank in range(self.ranks)
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
            window: Sliding window, refused.
            softcap: Scores become softcap * tanh(score / softcap).
            sink: (H,) logits of one more key with value zero.
            layer: The layer's number.

        Returns:
            (B, T, H, D).

        Raises:
            ValueError: A sliding window, or a full cache.
        """
        if window is not None:
            raise ValueError(
                f"This model has a sliding window of {window} tokens: it can't be read over several GPUs "
                "or with an 8-bit cache. Leave --gpus and --kv away."
            )
        spec = AttentionSpec(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap or None)
        out, lse = self._one(q, k, v, spec, layer) if self._layout is None else self._chunk(q, k, v, spec, layer)
        if sink is not None:
            out, lse = add_sink(out, lse, sink)
        return out.to(q.dtype)

    def _write(self, k: Tensor, v: Tensor, layer: int) -> None:
        mine = sum(stop - start for start, stop in self._new_pieces()[self.rank])
        if mine:
            self.store.write(layer, self.counts[self.rank], k[:, :mine], v[:, :mine])

    def _one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layer: int) -> OutLse:
        """One token, the same everywhere: each process attends to what it holds, all join all results."""
        self._write(k, v, layer)
        counts = [
            have + sum(stop - start for start, stop in new)
            for have, new in zip(self.counts, self._new_pieces(), strict=True)
        ]
        part = self._with_cache(q, spec, layer, counts[self.rank])
        wide = accumulation_dtype(q.dtype)
        out, lse = torch.zeros_like(q, dtype=wide), q.new_full((q.shape[0], q.shape[2], 1), float("-inf"), dtype=wide)
        for rank, (rows, statistic) in enumerate(self._from_all(part)):
            if counts[rank]:
                merge_into(out, lse, rows, statistic)
        return out, lse

    def _from_all(self, part: OutLse) -> list[OutLse]:
        if self.group is None:
            return [part]
        outs, lses = (all_gather(x.contiguous(), self.group).wait() for x in part)
        return list(zip(outs, lses, strict=True))

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layer: int) -> OutLse:
        """The chunk's own tokens, then what was there before."""
        if self._scheme is None:
            kernel = choose_kernel(self.kernel, q, spec, bottom_right=self.ranks > 1)
            self._scheme = Local(kernel) if self.group is None else Gathered(self.group, self._layout, kernel)
        out, lse = self._scheme.attend(q, k, v, spec)
        if self.length:
            out = out.to(accumulation_dtype(q.dtype))
            for part, part_lse in self._past(q, spec, layer):
                merge_into(out, lse, part, part_lse)
        self._write(k, v, layer)
        return out, lse

    def _past(self, q: Tensor, spec: AttentionSpec, layer: int) -> Iterator[OutLse]:
        """Results (B, T, H, D) and (B, H, T) of this process's queries with each process's part of the cache."""
        count = self.counts[self.rank]
        if self.group is None:
            yield self._with_cache(q, spec, layer, count)
            return
        everyone = all_gather(q.contiguous(), self.group).wait()  # (P, B, T, H, D)
        rows = everyone.transpose(0, 1).flatten(1, 2)  # (B, P T, H, D)
        out, lse = self._with_cache(rows, spec, layer, count)
        outs = out.unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()  # (P, B, T, H, D)
        lses = lse.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3).contiguous()  # (P, B, H, T)
        coming = all_to_all(outs, self.group), all_to_all(lses, self.group)
        for rank, pair in enumerate(zip(*(pending.wait() for pending in coming), strict=True)):
            if self.counts[rank]:
                yield pair

    def _with_cache(self, q: Tensor, spec: AttentionSpec, layer: int, count: int) -> OutLse:
        """Every query (B, T, H, D) with all `count` tokens held here; nothing, with weight zero, where none are."""
        wide = accumulation_dtype(q.dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
        if not count:
            return torch.zeros_like(q), lse
        spec = spec.non_causal()
        if q.shape[1] == 1:
            return self._by_keys(q, spec, layer, count, lse)
        kernel = choose_kernel(self.kernel, q, spec, bottom_right=True)
        if self.store.kv == "auto":
            return attention_forward(kernel, q, *self.store.read(layer, slice(count), slice(None)), spec)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads, of_query in self._head_groups(q, layer, count):
            keys, values = self.store.read(layer, slice(count), heads)
            out[:, :, of_query], lse[:, of_query] = attention_forward(kernel, q[:, :, of_query], keys, values, spec)
        return out, lse

    def _head_groups(self, q: Tensor, layer: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Kv heads and their query heads, few enough that widened keys and values stay small."""
        buffer = self.store.layers[layer][0].values
        kv_heads, group = buffer.shape[2], q.shape[2] // buffer.shape[2]
        each = 2 * buffer.shape[0] * count * buffer.shape[3] * q.element_size()
        step = max(1, min(kv_heads, BYTES_AT_ONCE // each))
        for start in range(0, kv_heads, step):
            stop = min(start + step, kv_heads)
            yield slice(start, stop), slice(start * group, stop * group)

    def _by_keys(self, q: Tensor, spec: AttentionSpec, layer: int, count: int, lse: Tensor) -> OutLse:
        """One query a row: blocks of keys, joined. Kernels made for many queries would leave most of a GPU idle."""
        out = torch.zeros_like(q, dtype=lse.dtype)
        for start in range(0, count, KEYS_AT_ONCE):
            keys, values = self.store.read(layer, slice(start, min(start + KEYS_AT_ONCE, count)), slice(None))
            merge_into(out, lse, *get_kernel("reference", q.device.type).forward(q.to(lse.dtype), keys, values, spec))
        return out, lse
