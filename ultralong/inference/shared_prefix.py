"""Reuse keys and values where one prompt begins as the one before it did.

Tests over the same running text differ from each other only behind their first needle: the text up to there has the
same keys and values in every prompt. What is kept is exact, because a causal model's states do not depend on what
follows.

T prompt tokens, C cache capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ultralong.inference.generate import PreallocatedLayer, make_cache


class SharedPrefix:
    """The cache of the last prompt, given on to the next as far as both begin alike.

    Args:
        model: Caches are made for it. One with sliding windows or other special layers gets a new cache each time.
        capacity: Tokens to make room for at least, so that prompts of nearly the same length share one buffer.
    """

    def __init__(self, model: PreTrainedModel, capacity: int = 0) -> None:
        self.model, self.capacity = model, capacity
        self.reused = 0
        self._cache: Cache | None = None
        self._ids: Tensor | None = None

    def start(self, input_ids: Tensor, capacity: int) -> tuple[Cache, int]:
        """A cache for one prompt, and how many of its first tokens are in it already.

        Args:
            input_ids: (1, T) the prompt.
            capacity: Tokens of prompt and answer.

        Returns:
            The cache, and a number of tokens below T: the last one is always left, as its logits are what is wanted.

        Raises:
            ValueError: Several prompts at once.
        """
        if len(input_ids) != 1:
            raise ValueError(f"A prefix is shared from prompt to prompt, one at a time: got {len(input_ids)} at once.")
        self.reused = self._common(input_ids[0])
        if self._cache is None or not self._fits(capacity):
            self.reused = 0
            # The old buffer goes before the new one comes: two would not fit beside a model at a million tokens.
            self._cache = None
            self._cache = make_cache(self.model, max(capacity, self.capacity))
        elif self.reused == 0:
            self._keep(0)
        else:
            self._keep(self.reused)
        self._ids = input_ids[0].clone()
        return self._cache, self.reused

    def _common(self, ids: Tensor) -> int:
        """Tokens that the last prompt and this one begin with, T - 1 at most."""
        if self._ids is None:
            return 0
        size = min(len(self._ids), len(ids) - 1)
        differ = torch.nonzero(self._ids[:size].to(ids.device) != ids[:size])
        return int(differ[0]) if len(differ) else size

    def _fits(self, capacity: int) -> bool:
        """Whether the cache has room, and holds what it should: a stopped prefill leaves it short."""
        layers = self._cache.layers if self._cache is not None else []
        return bool(layers) and all(
            isinstance(layer, PreallocatedLayer)
            and layer.is_initialized
            and layer.capacity >= capacity
            and layer.keys.shape[2] >= self.reused
            for layer in layers
        )

    def _keep(self, tokens: int) -> None:
        for layer in self._cache.layers if self._cache is not None else []:
            layer.keep_first(tokens)
