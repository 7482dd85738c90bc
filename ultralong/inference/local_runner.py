"""The runner of one process: any causal language model of transformers, with a KV cache of one sequence or several.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ultralong.attention.register import state_layers
from ultralong.inference.kv_cache import KvCache, ModelCache, make_cache
from ultralong.inference.runner import CachedRunner


class LocalRunner(CachedRunner):
    """Any causal language model of transformers, called with a cache of its own kind.

    Arguments are those of `CachedRunner`. Models with sliding windows or other special layers get transformers' own
    cache, and read each prompt anew. Layers that carry a state (Mamba, linear attention) begin each pass with an empty
    one in some of transformers' classes, so such a model reads a prompt at once, whatever `chunk` says.

    Raises:
        ValueError: As for `CachedRunner`, or the model's class takes no cache of this form and would forget the prompt.
    """

    _cache: Cache | None = None

    def __init__(
        self, model: PreTrainedModel, capacity: int | None = None, *, chunk: int | None = None, quiet: bool = True
    ) -> None:
        super().__init__(model, capacity, chunk=None if state_layers(model) else chunk, quiet=quiet)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{type(model).__name__} takes no past_key_values: what it had read would be lost.")

    @property
    def store(self) -> KvCache | None:
        """See `CachedRunner`: None where there are several sequences, or a cache of another form."""
        cache = self._cache
        return cache.store if isinstance(cache, ModelCache) and cache.store.rows == 1 else None

    def extend(self, tokens: Sequence[int]) -> None:
        """See `CachedRunner`."""
        super().extend(tokens)
        assert isinstance(self._cache, ModelCache), "there is a store"
        self._cache.show(self._cache.store.length)

    def _reusable(self, ids: Tensor, common: int) -> int:
        cache = self._cache
        written = isinstance(cache, ModelCache) and cache.store.rows == len(ids)
        return super()._reusable(ids, common) if written else 0

    def _prepare(self, rows: int, keep: int, capacity: int) -> None:
        cache = self._cache
        fits = isinstance(cache, ModelCache) and capacity <= cache.store.capacity and cache.store.rows == rows
        if not isinstance(cache, ModelCache) or not (keep or fits):
            # The old buffers go before the new ones come: both would not fit beside a model at a million tokens.
            self._cache = cache = None
            self._cache = make_cache(self.model, max(capacity, self.capacity or 0))
            return
        cache.store.truncate(keep)
        cache.store.reserve(self._grown(max(capacity, self.capacity or 0), cache.store.capacity))
        cache.show(keep)

    def _forward(self, ids: Tensor) -> Tensor:
        assert self._cache is not None
        try:
            logits = model_logits(self.model, ids, self._cache, 1)[:, -1]
        except BaseException:
            if isinstance(self._cache, ModelCache):  # some layers have the new tokens, and are read from their end
                self._cache.show(self._cache.store.length)
            raise
        if isinstance(self._cache, ModelCache):
            self._cache.store.append(ids.shape[1])
        return logits

    def _empty(self) -> None:
        self._cache = None


def model_logits(model: PreTrainedModel, ids: Tensor, cache: Cache | None, keep: int) -> Tensor:
    """Logits (B, keep, V) of the last positions of ids (B, T), behind what a cache holds."""
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=cache is not None, past_key_values=cache, **options).logits[:, -keep:]
