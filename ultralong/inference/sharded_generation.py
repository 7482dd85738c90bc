"""Read prompts of up to millions of tokens over one or several GPUs, and decode with the KV cache left there.

B batch, T prompt tokens, V vocabulary, P ranks.

Every rank calls the same methods with the same prompts; all get the same tokens. Memory is bounded: chunks bound the
activations, logits are made for the last token alone, and the cache is allocated once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.attention.collectives import Group
from ultralong.inference.decoding import ABANDONED
from ultralong.inference.kv_cache import KvCache, has_plain_layers
from ultralong.inference.runner import CachedRunner
from ultralong.inference.sharded_attention import ShardedAttention

CHUNK = 65536  # tokens of a prompt that each GPU takes in one pass


class ShardedRunner(CachedRunner):
    """A model whose KV cache is sharded over the ranks of a group, in the model's type or in fp8.

    Args:
        model: A causal language model whose layers all see the whole text; every rank has it whole. It is put into
            eval mode and onto `attn_implementation="ultralong"`.
        capacity: Most tokens of a prompt and what follows it; None makes room as it is needed.
        group: The ranks; None is this one alone.
        kv: Type of keys and values: `auto` as the model's, `fp8` half of it.
        chunk: Tokens of one pass over all ranks; None takes 65,536 a rank.
        kernel: Name of the attention kernel, or `auto`.
        quiet: True draws no progress bar.

    Raises:
        ValueError: A model with sliding windows or other special layers, a chunk below one token, or another `kv`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int | None = None,
        group: Group | None = None,
        *,
        kv: str = "auto",
        chunk: int | None = None,
        kernel: str = "auto",
        quiet: bool = False,
    ) -> None:
        ranks = 1 if group is None else dist.get_world_size(group)
        check_model(model)
        self.group = None if ranks == 1 or group is None else group
        rank = 0 if self.group is None else dist.get_rank(self.group)
        super().__init__(model, capacity, chunk=CHUNK * ranks if chunk is None else chunk, quiet=quiet or rank > 0)
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        self.cache = KvCache(self._share(capacity or 1), kv, ranks=ranks, rank=rank)
        self._context = ShardedAttention(self.cache, self.group, kernel)
        self._owner = 0  # who has the last pass's last token

    def agree(self, tokens: Tensor) -> Tensor:
        """See `Runner`."""
        if self.group is not None:
            dist.broadcast(tokens, dist.get_global_rank(self.group, 0), group=self.group)
        return tokens

    def abandon(self, tokens: Tensor, going: Sequence[bool]) -> None:
        """See `Runner`: takes the step that the others are about to take, then tells them."""
        if self.group is not None:
            self.decode(tokens, going)
            self.agree(torch.full_like(tokens, ABANDONED))

    def _is_interrupted(self) -> bool:
        if self.group is None:
            return super()._is_interrupted()
        first = dist.get_global_rank(self.group, 0)
        told = torch.tensor([dist.get_rank() == first and self.interrupted()], device=self.model.device)
        dist.broadcast(told, first, group=self.group)
        return bool(told)

    def _reusable(self, ids: Tensor, common: int) -> int:
        common = super()._reusable(ids, common)
        # Begin anew where so much of it lies here that what follows would not fit.
        needed = max(self.cache.held(common)) + self._share(max(self.capacity or 0, ids.shape[1]) - common, spare=False)
        return common if self.capacity is None or needed <= self.cache.capacity else 0

    def _prepare(self, rows: int, keep: int, capacity: int) -> None:
        capacity = self._share(max(capacity, self.capacity or 0))
        self.cache.truncate(keep)
        if keep == 0 and (rows != self.cache.rows or capacity > self.cache.capacity):
            self.cache.release()  # the old buffers go before the new ones come
        # Uneven shares of a beginning that is kept take room too.
        follow = self._share(max(capacity, keep) - keep, spare=False)
        self.cache.reserve(max(capacity, max(self.cache.held()) + follow) if keep else capacity)

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of the last token, right on the rank that has it."""
        context = self._context
        context.begin(ids.shape[1])
        self._owner, place = context.last()
        out = self.model(
            input_ids=context.shard(ids),
            position_ids=context.positions(ids.device),
            use_cache=False,
            attention_context=context,
            logits_to_keep=torch.tensor([place], device=ids.device),
        )
        context.end()
        return out.logits[:, -1]

    def _from_owner(self, logits: Tensor) -> Tensor:
        if self.group is not None:
            logits = logits.contiguous()
            dist.broadcast(logits, dist.get_global_rank(self.group, self._owner), group=self.group)
        return logits

    def _empty(self) -> None:
        self.cache.release()

    def _share(self, tokens: int, *, spare: bool = True) -> int:
        """Most tokens of so many that one rank takes: two more for each chunk where the chunk does not divide.

        With `spare` also the piece of the zigzag by which a kept beginning that ends inside a chunk may lie unevenly.
        """
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        if ranks == 1:
            return tokens
        chunk = self.chunk or tokens
        uneven = 2 * (math.ceil(tokens / chunk) + 1) + (math.ceil(chunk / (2 * ranks)) if spare else 0)
        return math.ceil(tokens / ranks) + uneven


def check_model(model: PreTrainedModel) -> None:
    """See that a model can be read through an attention context with a KV cache.

    Raises:
        ValueError: Some layer does not see the whole text, or the model takes no chosen logits.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} can't leave out the logits of all but the last tokens: several GPUs, "
            "8-bit keys and values and batches are for models that can. Use --gpus 1 --batch 1."
        )
    if not has_plain_layers(model):
        config = model.config.get_text_config()
        kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        found = ", ".join(kinds) or f"a sliding window of {config.sliding_window}"
        raise ValueError(
            f"{type(model).__name__} has {found}: several GPUs, 8-bit keys and values and batches are for "
            "models whose layers all see the whole text. Leave --gpus, --kv and --batch away."
        )
