"""The tiled loss inside a Hugging Face model, for trainers that call `model(labels=...)` and take `.loss`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ultralong.data.rows.packed_rows import IGNORE
from ultralong.training.loss import LanguageModelLoss


def tile_loss(model: PreTrainedModel, tile: int = 2048) -> None:
    """Let a causal language model compute its loss in tiles of tokens, so that logits of a whole row never exist.

    The model's `forward` is replaced on this instance where `shift_labels` are passed, and left alone elsewhere
    (generation, evaluation by logits). Its output then has `loss` only: the sum over the targets, divided by
    `num_items_in_batch`, or by the targets that are here. TRL's `SFTTrainer` has tiles of its own; don't use both.

    Args:
        model: The model, before adapters are put into it and before a trainer wraps it.
        tile: Tokens whose logits exist at a time.

    Raises:
        ValueError: The model changes its logits after the head, or the head has a bias.
    """
    whole, loss_of = model.forward, LanguageModelLoss(model, tile)

    @functools.wraps(type(model).forward)
    def forward(
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return whole(*args, **{name: x for name, x in given.items() if x is not None}, **inputs)
        inputs.pop("use_cache", None)  # a pass for the loss has no cache
        total, _ = loss_of(*args, labels=shift_labels, **inputs)
        count = (shift_labels != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    model.forward = forward
