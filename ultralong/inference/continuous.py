"""Continuous batching: rows of one cache in which prompts begin and end at different times.

B rows, b prompts, n tokens of a packed pass, T tokens of a sequence, t new ones, K kv heads, D head size, V vocabulary.
Arithmetic and limits are those of `batched`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.inference.batched import BatchedAttention
from ultralong.inference.kv_cache import KvCache
from ultralong.inference.sharded_generation import check_model
from ultralong.rope.tables import RopeTables


class ContinuousBatch:
    """Reads prompts into rows of a cache while other rows are being answered.

    Args:
        model: As for `BatchedRunner`, with frequencies that are the same for texts of any length up to `capacity`.
        rows: Prompts B that can be answered together.
        capacity: Most tokens of a prompt and its answer.

    Raises:
        ValueError: A model with special layers, or with frequencies that follow the length of the text.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        check_model(model)
        self._rope = RopeTables(model)
        if not self._rope.same(1, capacity):
            raise ValueError(
                "The model's RoPE follows the length of the text, which differs between the rows of a batch."
            )
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        self.model, self.rows, self.capacity = model.eval(), rows, capacity
        self._context: BatchedAttention | None = None
        self._held = [0] * rows  # tokens of each row; 0 where it is free

    @property
    def free(self) -> list[int]:
        """Rows without a prompt, lowest first: a step reads rows up to the highest that is taken."""
        return [row for row, held in enumerate(self._held) if not held]

    @torch.no_grad()
    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Tensor:
        """Read prompts into free rows; logits (b, V) of each one's last token."""
        context, lengths = self._opened(), [len(prompt) for prompt in prompts.values()]
        positions = context.begin_prompts(list(prompts), lengths)
        for row, length in zip(prompts, lengths, strict=True):
            self._held[row] = length
        ids = torch.tensor([[token for prompt in prompts.values() for token in prompt]], device=self.model.device)
        ends = torch.tensor(list(accumulate(lengths)), device=self.model.device) - 1
        return self._logits(context, ids, positions, ends)[0]

    @torch.no_grad()
    def adopt(self, row: int, store: KvCache) -> None:
        """Copy a sequence that another has read into a free row, to go on with it here.

        Args:
            row: The row.
            store: Keys and values of that one sequence, in the model's type, on one device.
        """
        context, held = self._opened(), store.length
        positions = torch.arange(held, device=self.model.device)
        rows = torch.full_like(positions, row)
        for layer in store.layers:
            keys, values = store.read(layer, slice(held))  # (1, T, K, D)
            context.cache.scatter(layer, self.rows, rows, positions, keys[0], values[0])
        context.lengths[row] = self._held[row] = held

    @torch.no_grad()
    def give_back(self, row: int, store: KvCache) -> None:
        """Write what a row holds beyond a `store` that it was copied from behind that; whose owner counts it."""
        assert self._context is not None, "adopt comes first"
        new = slice(store.length, self._held[row])
        for layer in store.layers if new.stop > new.start else ():
            keys, values = self._context.cache.read(layer, new)  # (B, t, K, D)
            store.write(layer, new.start, keys[row : row + 1], values[row : row + 1])

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """Give each taken row its next token; logits (V,) for the one after, by row."""
        assert self._context is not None, "begin comes first"
        count = max(tokens) + 1
        going = torch.zeros(count, dtype=torch.bool)
        ids = torch.zeros(count, 1, dtype=torch.long)
        for row, token in tokens.items():
            going[row], ids[row] = True, token
        going, held = going.to(self.model.device), [n + (row in tokens) for row, n in enumerate(self._held[:count])]
        positions = self._context.begin_token(going, max(held))
        logits = self._logits(self._context, ids.to(self.model.device), positions, 1)[:, -1]
        self._context.end_token(going)
        self._held[:count] = held
        return {row: logits[row] for row in tokens}

    def end(self, row: int) -> None:
        """Free a row."""
        self._held[row] = 0
        if self._context is not None:
            self._context.lengths[row] = 0  # what a step writes to a free row stays inside of it

    def release(self) -> None:
        """Give the cache's memory back; all rows are free."""
        self._context, self._held = None, [0] * self.rows

    def _opened(self) -> BatchedAttention:
        if self._context is None:
            self._context = BatchedAttention(self.rows, self.capacity, self.model.device)
        return self._context

    def _logits(self, context: BatchedAttention, ids: Tensor, positions: Tensor, keep: int | Tensor) -> Tensor:
        with self._rope.at(self.capacity):
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, attention_context=context, logits_to_keep=keep
            ).logits
        return logits
