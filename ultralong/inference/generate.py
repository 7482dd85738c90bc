"""Read a long prompt in chunks and decode greedily, without ever holding logits for more than the last tokens.

B batch, T prompt tokens, K tokens kept, V vocabulary, H kv heads, D head size, C cache capacity.

At a million tokens three things of a plain forward pass do not fit: the (T, V) logits, the MLP's activations for all T
at once, and a key-value cache that is copied whenever it grows. Chunks bound the first two; the cache here is
allocated once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from ultralong.inference.shared_prefix import SharedPrefix


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer of fixed capacity; what is returned is a view of its filled part.

    A `StaticLayer` returns the whole buffer and needs a mask over it; this one costs the memory of its capacity and
    the attention of its length, and never copies what it holds.
    """

    def __init__(self, capacity: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, now that the shapes are known: keys and values (B, H, T, D)."""
        super().lazy_initialization(key_states, value_states)
        self.key_buffer, self.value_buffer = (
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3])  # (B, H, C, D)
            for states in (key_states, value_states)
        )
        self.keys, self.values = self.key_buffer[:, :, :0], self.value_buffer[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, D) behind the old and return all that is filled.

        Raises:
            ValueError: They do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"The key-value cache holds {self.capacity:,} tokens and {end:,} were given: make it larger."
            )
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]  # (B, H, end, D)
        return self.keys, self.values

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first tokens; the buffers stay."""
        self.keys, self.values = self.key_buffer[:, :, :tokens], self.value_buffer[:, :, :tokens]


def make_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """A key-value cache for `capacity` tokens.

    Models with sliding-window or other special layers get transformers' own growing cache, which knows them.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    plain = getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
    if plain and all(kind == "full_attention" for kind in layer_types):
        return Cache(layers=[PreallocatedLayer(capacity) for _ in range(config.num_hidden_layers)])
    return DynamicCache(config=config)


def _forward(model: PreTrainedModel, input_ids: Tensor, cache: Cache | None, keep: int) -> Tensor:
    """Logits (B, keep, V) of the last positions of `input_ids` (B, T)."""
    options: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        options["past_key_values"] = cache
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    return model(input_ids=input_ids, **options).logits[:, -keep:]


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, input_ids: Tensor, *, keep: int = 1, chunk: int | None = None, cache: Cache | None = None
) -> Tensor:
    """Run a prompt through the model and return the logits of its last `keep` positions.

    Args:
        model: A causal language model in eval mode.
        input_ids: (B, T) token ids, no padding.
        keep: How many of the last positions to return logits for.
        chunk: Tokens of one pass; None takes all at once. With chunks the result equals a single pass up to rounding.
        cache: Filled with the prompt when given; chunks make one of their own when it is not.

    Returns:
        (B, keep, V) logits.

    Raises:
        ValueError: An empty prompt, or `keep` or `chunk` that do not fit it.
    """
    tokens = input_ids.shape[1]
    if not 1 <= keep <= tokens:
        raise ValueError(f"Logits of {keep} positions were asked for from a prompt of {tokens} tokens.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"A prefill chunk must hold at least one token, got {chunk}.")
    if chunk is None or chunk >= tokens:
        return _forward(model, input_ids, cache, keep)
    cache = make_cache(model, tokens) if cache is None else cache
    # The last pass must hold all positions that are kept.
    done = 0
    while tokens - done > max(chunk, keep):
        step = min(chunk, tokens - done - keep)
        _forward(model, input_ids[:, done : done + step], cache, 1)
        done += step
    return _forward(model, input_ids[:, done:], cache, keep)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Ids that end a generation, from the model's generation config or, failing that, its config."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return set() if ids is None else {int(ids)} if isinstance(ids, int) else {int(token) for token in ids}


@torch.inference_mode()
def generate_greedy(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    chunk: int | None = None,
    stop: set[int] | None = None,
    shared: SharedPrefix | None = None,
) -> list[list[int]]:
    """Continue each prompt with the most likely token at each step.

    Equal to `model.generate(do_sample=False)` on prompts of one length, with memory bounded as said on top.

    Args:
        model: A causal language model in eval mode.
        input_ids: (B, T) prompts of one length, no padding.
        max_new_tokens: Most tokens to add to each.
        chunk: Tokens of one prefill pass; None takes the prompt at once.
        stop: Ids that end a sequence; None takes the model's own.
        shared: Keeps keys and values from prompt to prompt, one prompt at a time.

    Returns:
        For each prompt its new tokens, without the id that ended it.

    Raises:
        ValueError: `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    stop = end_tokens(model) if stop is None else stop
    capacity = input_ids.shape[1] + max_new_tokens
    cache, done = (make_cache(model, capacity), 0) if shared is None else shared.start(input_ids, capacity)
    token = prefill(model, input_ids[:, done:], chunk=chunk, cache=cache)[:, -1].argmax(-1, keepdim=True)  # (B, 1)
    return greedy(
        token, lambda last: _forward(model, last, cache, 1)[:, -1].argmax(-1, keepdim=True), max_new_tokens, stop
    )


def greedy(token: Tensor, following: Callable[[Tensor], Tensor], most: int, stop: Collection[int]) -> list[list[int]]:
    """Token after token until each row has stopped or has as many as it may.

    Args:
        token: The first token of each row, (B, 1).
        following: The next token (B, 1) of the last one (B, 1).
        most: Tokens of an answer at most.
        stop: Tokens that end an answer, and are not part of it.

    Returns:
        Each row's answer.
    """
    answers: list[list[int]] = [[] for _ in range(len(token))]
    open_rows = set(range(len(answers)))
    for step in range(most):
        for row, value in enumerate(token[:, 0].tolist()):
            if row in open_rows and value in stop:
                open_rows.discard(row)
            elif row in open_rows:
                answers[row].append(value)
        if not open_rows or step + 1 == most:
            break
        token = following(token)
    return answers
