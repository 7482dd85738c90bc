"""Runners: a model with its KV cache, which reads prompts and then one token after the other.

B batch, T prompt tokens, V vocabulary.

`CachedRunner` holds what does not depend on where keys and values are: prompts are read in chunks, and the tokens that
a prompt begins with and the cache already holds are not read again. That is exact, since the states of a causal model
do not depend on what follows, unless its RoPE follows the length of the text (longrope, dynamic): where the frequencies
change, all is read again, as one pass over the whole text would do. `LocalRunner` (`local_runner`) serves any model of
transformers on one device; `ShardedRunner` (`sharded_generation`) several GPUs and fp8; `BatchedRunner` (`batched`)
many prompts of unequal lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ultralong.inference.kv_cache import KvCache
from ultralong.rope.tables import RopeTables
from ultralong.utils.progress import progress

SHOWN = 131072  # prompts of so many tokens get a progress bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
Prompts = Tensor | Sequence[Sequence[int]]  # ids, (B, T) where they are a tensor


class Runner(Protocol):
    """A model with a KV cache. Several ranks call the same methods with the same arguments.

    Attributes:
        model: The model.
        reused: How many tokens of the last prompt were in the cache already.
    """

    model: PreTrainedModel
    reused: int

    def prefill(self, prompts: Prompts, budgets: Sequence[int] = (0,)) -> Tensor:
        """Read prompts and return the logits (B, V) of each one's last token, the same on every rank.

        Args:
            prompts: Token ids, no padding.
            budgets: How many tokens will follow each at most, for which room is made.
        """
        ...

    def decode(self, tokens: Tensor, going: Sequence[bool] | None = None) -> Tensor:
        """Read one more token (B,) of each row and return the logits (B, V) behind it.

        Args:
            tokens: The tokens.
            going: Which rows go on; what is returned for the others means nothing. None: all.
        """
        ...

    def agree(self, tokens: Tensor) -> Tensor:
        """The first rank's tokens (B,), on every rank."""
        ...

    def abandon(self, tokens: Tensor, going: Sequence[bool]) -> None:
        """End the decoding of the other ranks, which are about to call `decode` with these arguments."""
        ...

    def release(self) -> None:
        """Give the cache's memory back."""
        ...


def as_tensor(prompts: Prompts, device: torch.device) -> Tensor:
    """Prompts of one length as (B, T) ids on a device.

    Raises:
        ValueError: Their lengths differ.
    """
    if isinstance(prompts, Tensor):
        return prompts.to(device)
    if len({len(prompt) for prompt in prompts}) != 1:
        raise ValueError("Prompts of different lengths were given: read them one by one, or with a BatchedRunner.")
    # By way of arrays: torch makes a tensor of a million numbers in 0.15 s, and no other thread runs meanwhile.
    return torch.stack([torch.from_numpy(np.array(array("q", prompt))) for prompt in prompts]).to(device)


class Interrupted(RuntimeError):
    """Reading a prompt was left, as `CachedRunner.interrupted` said; what was read stays in the cache."""


class CachedRunner(ABC):
    """Reads prompts of one length in chunks, and keeps the cache for what the next prompt shares with the last.

    Args:
        model: A causal language model; it is put into eval mode.
        capacity: Most tokens of a prompt and what follows it; None makes room as it is needed.
        chunk: Tokens of one pass; None takes a prompt at once.
        quiet: True draws no progress bar.

    Attributes:
        interrupted: Asked between the chunks of a prompt, on the first rank; True leaves it with `Interrupted`.
        most: Most tokens that a cache on one GPU may be made larger for than a prompt needs; 0 for none.

    Raises:
        ValueError: A chunk below one token.
    """

    def __init__(
        self, model: PreTrainedModel, capacity: int | None = None, *, chunk: int | None = None, quiet: bool = True
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"A prefill chunk must hold at least one token, got {chunk}.")
        self.model, self.capacity, self.chunk, self.quiet = model.eval(), capacity, chunk, quiet
        self.reused = 0
        self.interrupted: Callable[[], bool] = bool  # False
        self.most = 0
        self._rope, self._text = RopeTables(model), 0  # tokens of the text whose frequencies the cached keys have
        self._room = 0
        self._ids: Tensor | None = None  # (B, T) what the cache holds, but for
        self._decoded: list[Tensor] = []  # (B,) what was decoded behind it

    @torch.no_grad()
    def prefill(self, prompts: Prompts, budgets: Sequence[int] = (0,)) -> Tensor:
        """See `Runner`.

        Raises:
            ValueError: An empty prompt, prompts of different lengths, or no room for them and what follows.
        """
        ids = as_tensor(prompts, self.model.device)
        tokens, follow = ids.shape[1], max(budgets)
        self.check(tokens, follow)
        self.reused = self._reusable(ids, common_prefix(self._held(), ids))
        return self._read(ids, tokens + follow)

    def check(self, tokens: int, follow: int) -> None:
        """See that a prompt of `tokens` tokens and `follow` more can be read.

        Raises:
            ValueError: It is empty, or there is no room.
        """
        room = tokens + follow if self.capacity is None else self.capacity
        if not 1 <= tokens <= room:
            raise ValueError(f"A prompt of {tokens:,} tokens was given, and there is room for 1 to {room:,}.")
        if tokens + follow > room:
            raise ValueError(
                f"There is room for {room:,} tokens; a prompt of {tokens:,} and {follow:,} new tokens do not fit."
            )

    def _read(self, ids: Tensor, room: int) -> Tensor:
        """Make room and read what is not in the cache. Where a chunk is interrupted, what it holds counts up to it."""
        ids = ids.clone()  # the caller's may change
        tokens, step = ids.shape[1], self.chunk or ids.shape[1]
        # Before there is room: where memory runs out, the cache has forgotten the rest already.
        self._ids, self._decoded, self._room = ids[:, : self.reused], [], room
        self._prepare(len(ids), self.reused, room)
        self._text = tokens
        logits = ids.new_empty(0)
        with progress(
            total=_cost(tokens) - _cost(self.reused),
            desc=f"reading {tokens:,} tokens",
            bar_format=BAR,
            quiet=self.quiet or tokens - self.reused < SHOWN,
        ) as bar:
            for start in range(self.reused, tokens, step):
                if start > self.reused and self._is_interrupted():
                    raise Interrupted(f"left at token {start:,} of {tokens:,}")
                end = min(start + step, tokens)
                with self._rope.at(tokens):
                    logits = self._forward(ids[:, start:end])
                self._ids = ids[:, :end]
                if not bar.disable and logits.is_cuda:
                    torch.cuda.synchronize()  # the bar shall show what is done, not what is queued
                bar.update(_cost(end) - _cost(start))
        return self._from_owner(logits)

    @torch.no_grad()
    def decode(self, tokens: Tensor, going: Sequence[bool] | None = None) -> Tensor:
        """See `Runner`."""
        length = (0 if self._ids is None else self._ids.shape[1]) + len(self._decoded) + 1
        if not self._rope.same(self._text, length):
            held = self._held()
            assert held is not None, "prefill comes first"
            self.reused = 0
            return self._read(torch.cat([held, tokens[:, None]], 1), max(self._room, length))
        with self._rope.at(length):
            logits = self._forward(tokens[:, None])
        self._decoded.append(tokens)
        return logits

    @property
    def store(self) -> KvCache | None:
        """Keys and values of the one sequence that was read last; None where another can't go on with them."""
        return None

    def extend(self, tokens: Sequence[int]) -> None:
        """Count tokens that another has read behind that sequence and written to `store`."""
        store = self.store
        assert store is not None, "what can't be shared is read by nobody else"
        store.append(len(tokens))
        self._decoded += torch.tensor(tokens, device=self.model.device)[:, None].unbind()

    def _is_interrupted(self) -> bool:
        """Whether to leave the prompt here; the same on every rank."""
        return self.interrupted()

    def agree(self, tokens: Tensor) -> Tensor:
        """See `Runner`."""
        return tokens

    def abandon(self, tokens: Tensor, going: Sequence[bool]) -> None:
        """See `Runner`: only a sharded runner has other ranks to tell."""
        return

    def release(self) -> None:
        """See `Runner`."""
        self._ids, self._decoded = None, []
        self._empty()

    def _held(self) -> Tensor | None:
        """The ids (B, T) whose keys and values are in the cache."""
        if self._ids is None or not self._decoded:
            return self._ids
        return torch.cat([self._ids, torch.stack(self._decoded, 1)], 1)

    def _from_owner(self, logits: Tensor) -> Tensor:
        """The last token's logits, from the rank that has them to all."""
        return logits

    def _reusable(self, ids: Tensor, common: int) -> int:
        """How many of the first `common` tokens can stay in the cache."""
        return common if self._rope.same(self._text, ids.shape[1]) else 0

    def _grown(self, capacity: int, now: int) -> int:
        """Room to make for `capacity` tokens in a cache for `now`, whose content stays.

        Each growth copies the cache and has the fused step's graph made anew: a chat shall not grow it every turn.
        """
        return capacity if capacity <= now else max(capacity, min(now + now // 4, self.most))

    @abstractmethod
    def _prepare(self, rows: int, keep: int, capacity: int) -> None:
        """Forget all but the first `keep` tokens and make room for `capacity`."""

    @abstractmethod
    def _forward(self, ids: Tensor) -> Tensor:
        """Run tokens (B, t) through the model behind what the cache holds; logits (B, V) of the last."""

    @abstractmethod
    def _empty(self) -> None:
        """Give the cache's memory back."""


def common_prefix(held: Tensor | None, ids: Tensor) -> int:
    """Tokens that ids (B, T) and what is held begin with, all but the last: its logits are wanted."""
    if held is None or len(held) != len(ids):
        return 0
    size = min(held.shape[1], ids.shape[1] - 1)
    differ = torch.nonzero((held[:, :size] != ids[:, :size]).any(0))
    return int(differ[0]) if len(differ) else size


def _cost(tokens: int) -> float:
    """What reading so many tokens costs, for the time that is left: matrix products, and attention to all before."""
    return tokens * (tokens + 2.0**17)
