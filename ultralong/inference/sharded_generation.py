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
from ultralong.inference.decode_step.step import fast_step
from ultralong.inference.decoding import ABANDONED
from ultralong.inference.kv_cache import KvCache, has_plain_layers
from ultralong.inference.runner import CachedRunner
from ultralong.inference.sharded_attention import ShardedAttention

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
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
        fused: Decode by fused kernels in one CUDA graph where model, device and packages allow it (`decode_step`).
        exchange: How the fused kernels' ranks join their attention (`decode_step.exchange.WAYS`).
        ahead: Start a step before the host has read its token, so that a GPU need not wait (`decoding.RunsAhead`).

    Attributes:
        ahead: Whether that is done: not where RoPE follows the length of the text, which is then read anew.

    Raises:
        ValueError: A model with layers that are no attention, a chunk below one token, another `kv`, or an `exchange`
            that GPUs or another rank don't allow.
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
        fused: bool = True,
        exchange: str = "auto",
        ahead: bool = True,
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
        self.step = fast_step(model, self.cache, self.group, exchange) if fused else None
        self.ahead = ahead and self._rope.same(1, 2**40)
        self._owner = 0  # who has the last pass's last token

    @property
    def store(self) -> KvCache | None:
        """See `CachedRunner`: None where other ranks hold a part, in fp8, or where there are several sequences."""
        return self.cache if self.group is None and self.cache.kv == "auto" and self.cache.rows == 1 else None

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

    def take_back(self) -> None:
        """See `decoding.RunsAhead`: what is written behind the tokens held means nothing."""
        self._decoded.pop()
        self.cache.truncate(self.cache.length - 1)

    def abandon_ahead(self, tokens: Tensor, more: bool) -> None:
        """See `decoding.RunsAhead`; the cache then holds what it does after `abandon`."""
        if self.group is None:
            self.take_back()
            return
        self.agree(torch.full_like(tokens, ABANDONED))
        if more:
            self.decode(torch.zeros_like(tokens))
            self.take_back()

    def _is_interrupted(self) -> bool:
        if self.group is None:
            return super()._is_interrupted()
        first = dist.get_global_rank(self.group, 0)
        told = torch.tensor([dist.get_rank() == first and self.interrupted()], device=self.model.device)
        dist.broadcast(told, first, group=self.group)
        return bool(told)

    def _reusable(self, ids: Tensor, common: int) -> int:
        common = super()._reusable(ids, common)
        # Start over where so much of it lies here that what follows would not fit.
        needed = max(self.cache.held(common)) + self._share(max(self.capacity or 0, ids.shape[1]) - common, spare=False)
        return common if self.capacity is None or needed <= self.cache.capacity else 0

    def _prepare(self, rows: int, keep: int, capacity: int) -> None:
        capacity = self._share(max(capacity, self.capacity or 0))
        self.cache.truncate(keep)
        if keep == 0 and (rows != self.cache.rows or capacity > self.cache.capacity):
            self.cache.release()  # the old buffers go before the new ones come
        # Uneven shares of a beginning that is kept take room too.
        follow = self._share(max(capacity, keep) - keep, spare=False)
        needed = max(capacity, max(self.cache.held()) + follow) if keep else capacity
        self.cache.reserve(self._grown(needed, self.cache.capacity) if keep and self.group is None else needed)

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of the last token, right on the rank that has it."""
        context = self._context
        context.begin(ids.shape[1])
        self._owner, place = context.last()
        # Every rank must decide alike, and have buffers: where each holds a token, it has.
        short = self.step is not None and ids.shape[1] == 1 and min(self.cache.held()) > 0
        if self.step is not None and short and self.step.checked:
            logits = self.step(ids[:, 0], *context.place())
            context.end()
            return logits
        logits = self._by_model(ids, place)
        if self.step is not None and short:  # all ranks have the same logits, so all decide alike
            self.step = self.step if self.step.agrees(logits, ids[:, 0], *context.place()) else None
        context.end()
        return logits

    def _by_model(self, ids: Tensor, place: int) -> Tensor:
        """Logits (B, V) by the model's own code, of one of this rank's tokens."""
        context = self._context
        out = self.model(
            input_ids=context.shard(ids),
            position_ids=context.positions(ids.device),
            use_cache=False,
            attention_context=context,
            logits_to_keep=torch.tensor([place], device=ids.device),
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _from_owner(self, logits: Tensor) -> Tensor:
        if self.group is not None:
            logits = logits.contiguous()
            dist.broadcast(logits, dist.get_global_rank(self.group, self._owner), group=self.group)
        return logits

    def prefill_random(self, ids: Tensor, follow: int) -> None:
        """Pretend to have read a prompt (B, T): keys and values are random numbers, in seconds at any length.

        For measuring what follows a prompt whose reading takes minutes.
        """
        rows, tokens = ids.shape
        self.release()
        self._room = tokens + follow
        self._prepare(rows, 0, self._room)
        config = self.model.config.get_text_config()
        make = torch.Generator(self.model.device).manual_seed(0)
        step = self.chunk or tokens
        for start in range(0, tokens, step):
            self._context.begin(min(step, tokens - start))
            _, held, _ = self._context.place()
            mine = self._context.shares()[self.cache.rank]
            for layer in range(config.num_hidden_layers if mine else 0):
                shape = (2, rows, mine, config.num_key_value_heads, self._head_size)
                pair = torch.randn(shape, generator=make, device=self.model.device, dtype=self.model.dtype)
                self.cache.write(layer, held, *pair)
            self._context.end()
        self._ids, self._text = ids.clone(), tokens

    @property
    def _head_size(self) -> int:
        config = self.model.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def _empty(self) -> None:
        self.cache.release()
        self.cache.capacity = self._share(self.capacity or 1)  # what memory ran out for is not asked for again

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


def check_model(model: PreTrainedModel, batches: bool = False) -> None:
    """See that a model can be read through an attention context with a KV cache.

    Args:
        model: The model.
        batches: Prompts of unequal lengths are to be read together, which takes layers that see the whole text.

    Raises:
        ValueError: Some layer is neither full nor sliding-window attention, or the model takes no chosen logits.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} can't leave out the logits of all but the last tokens: several GPUs, "
            "8-bit keys and values and batches are for models that can. Use --gpus 1 --batch 1."
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds:
        raise ValueError(
            f"{type(model).__name__} has layers of {', '.join(sorted(kinds))}: several GPUs, 8-bit keys and values and "
            "batches are for models whose layers are full or sliding-window attention. Leave --gpus, --kv and --batch "
            "away."
        )
    if batches and not has_plain_layers(model):
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        raise ValueError(
            f"{type(model).__name__} has a sliding window of {window}: only models whose layers "
            "all see the whole text read prompts together. Leave --batch away."
        )
