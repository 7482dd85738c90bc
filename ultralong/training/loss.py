"""Cross entropy of a language-model head without ever holding the logits of a whole row.

N tokens, d hidden size, V vocabulary, V' its rows with padding (`memory.logits`), m tokens of a tile. At 1,048,576
tokens and a vocabulary of 128,256 the float32 logits would take 538 GB; a tile of them at a time takes `tile * V * 4`
bytes.

The loss is a *sum*, and the count of targets is returned beside it: the caller divides by the count of the whole
optimizer step, over all processes and micro-batches. A mean taken anywhere below that weighs tokens unequally as soon
as rows differ in their number of targets.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultralong.attention.context import AttentionContext
from ultralong.data.rows.packed_rows import IGNORE
from ultralong.rope.tables import RopeTables
from ultralong.training.memory.logits import aligned_head, by_logits, logits_of, normalise, product


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tile: int = 2048,
    short_losses: Tensor | None = None,
    weight_cap: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of `hidden @ weight.T` against `labels`, computed a tile of tokens at a time.

    The gradients of both inputs are made in the forward pass, while a tile's logits exist, and scaled by the incoming
    gradient in the backward pass: any factor put on the loss afterwards reaches both. The gradient of `weight` is
    summed over tiles in float32. Under autocast the products are computed in its type.

    Args:
        hidden: (N, d), the decoder's last hidden states.
        weight: (V, d), the head.
        labels: (N,) int64, already shifted: `labels[n]` is the target of `hidden[n]`; -100 for none.
        tile: Tokens whose logits exist at a time.
        short_losses: (N,) the targets' losses with a short context, NaN where there is none (LongCE): each loss in the
            sum is then multiplied by exp(short loss - loss), at most `weight_cap`; by 1 where there is none. No
            gradient goes through these weights.
        weight_cap: See `short_losses`.

    Returns:
        The sum over all targets (float32 scalar, or float64 for float64 inputs; 0 with a graph where there is no
        target), and each token's own loss (N,), detached, 0 where there is no target.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, d) and weight (V, d), found {tuple(hidden.shape)}, {tuple(weight.shape)}."
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels must be ({hidden.shape[0]},), one for each hidden state, found {tuple(labels.shape)}."
        )
    if short_losses is not None and short_losses.shape != labels.shape:
        raise ValueError(f"short_losses must be as labels, {tuple(labels.shape)}, found {tuple(short_losses.shape)}.")
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _TiledCrossEntropy.apply(hidden, weight, labels, tile, compute, short_losses, weight_cap)


def _long_ce_weights(losses: Tensor, short_losses: Tensor, cap: float) -> Tensor:
    """LongCE's weights (m,) of losses (m,): what the long context is worth to each target."""
    gained = (short_losses - losses).clamp(max=math.log(cap)).exp()
    return torch.where(short_losses.isnan(), 1.0, gained)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tile: int,
        compute: torch.dtype,
        short_losses: Tensor | None,
        weight_cap: float,
    ) -> Any:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = aligned_head(weight, compute)  # (V', d)
        losses = torch.zeros(labels.shape, dtype=accumulate, device=hidden.device)  # (N,)
        weighted = losses if short_losses is None else torch.zeros_like(losses)  # (N,)
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None  # (N, d)
        d_weight = torch.zeros_like(head, dtype=accumulate) if wants_weight else None  # (V', d)
        # Tokens without a target are left out before the product: in SFT they are most of a row.
        targets = (labels != IGNORE).nonzero().squeeze(1)  # (M,)
        for index in targets.split(tile):
            part = hidden[index].to(compute)  # (m, d)
            logits = logits_of(part, head, len(weight), accumulate)  # (m, V')
            wanted = labels[index, None]  # (m, 1)
            normaliser = normalise(logits)  # (m, 1)
            losses[index] = (normaliser - logits.gather(1, wanted)).squeeze(1)
            if short_losses is not None:
                weights = _long_ce_weights(losses[index], short_losses[index].to(accumulate), weight_cap)  # (m,)
                weighted[index] = weights * losses[index]
            if d_hidden is None and d_weight is None:
                continue
            d_logits = by_logits(logits, normaliser, wanted, compute)  # (m, V')
            del logits
            if short_losses is not None:
                d_logits.mul_(weights[:, None])
            if d_hidden is not None:
                d_hidden[index] = (d_logits @ head).to(hidden.dtype)
            if d_weight is not None:
                d_weight += product(d_logits.T, part, accumulate)
            del d_logits  # before the next tile's logits
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight[: len(weight)])
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return weighted.sum(), losses

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_total.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_total).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None


def tiled_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int = 2048) -> Tensor:
    """Each token's own cross entropy with a gradient, computed a tile of tokens at a time in both passes.

    For losses that are no plain sum, as in reinforcement learning: minus this is the log-probability of a token. The
    logits of a tile are computed again in the backward pass, one product more than `tiled_cross_entropy`.

    Args:
        hidden: (N, d), the decoder's last hidden states.
        weight: (V, d), the head.
        labels: (N,) int64, already shifted; -100 for none.
        tile: Tokens whose logits exist at a time.

    Returns:
        (N,), 0 where there is no target; float32, or float64 for float64 inputs.

    Raises:
        ValueError: `labels` are not one for each hidden state.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be (N, d) and labels (N,), found {tuple(hidden.shape)}, {tuple(labels.shape)}.")
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _TiledTokenLosses.apply(hidden, weight, labels, tile, compute)


class _TiledTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, compute: torch.dtype) -> Tensor:
        ctx.accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ctx.tile, ctx.compute, head = tile, compute, aligned_head(weight, compute)  # (V', d)
        losses = torch.zeros(labels.shape, dtype=ctx.accumulate, device=hidden.device)  # (N,)
        for index in (labels != IGNORE).nonzero().squeeze(1).split(tile):
            logits = logits_of(hidden[index].to(compute), head, len(weight), ctx.accumulate)  # (m, V')
            losses[index] = (normalise(logits) - logits.gather(1, labels[index, None])).squeeze(1)
        ctx.save_for_backward(hidden, weight, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        head, d_hidden = aligned_head(weight, ctx.compute), torch.zeros_like(hidden)
        d_weight = torch.zeros_like(head, dtype=ctx.accumulate) if wants_weight else None
        for index in (labels != IGNORE).nonzero().squeeze(1).split(ctx.tile):
            part = hidden[index].to(ctx.compute)  # (m, d)
            logits = logits_of(part, head, len(weight), ctx.accumulate)  # (m, V')
            d_logits = by_logits(logits, normalise(logits), labels[index, None], ctx.accumulate)  # (m, V')
            d_logits = (d_logits * d_losses[index, None]).to(ctx.compute)
            d_hidden[index] = (d_logits @ head).to(hidden.dtype)
            if d_weight is not None:
                d_weight += product(d_logits.T, part, ctx.accumulate)
        weights = None if d_weight is None else d_weight[: len(weight)].to(weight.dtype)
        return d_hidden if wants_hidden else None, weights, None, None, None


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not a plain product with its head.

    Raises:
        ValueError: It changes its logits after the head (soft cap, scaling, bias), or has a loss of its router.
    """
    head = model.get_output_embeddings()
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__} needs its router's load-balancing loss (output_router_logits), which is not "
            "linear in the tokens: summed over processes that share a row it would be another loss. Set "
            "output_router_logits to false in the model's config.json to train on the cross entropy alone."
        )
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        if (found := getattr(model.config, name, neutral)) not in (None, neutral):
            raise ValueError(
                f"{type(model).__name__} changes its logits after the head ({name}={found}), which the tiled loss does "
                "not do. Train a model without it."
            )
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"The model's head must be a linear layer without bias, found {head}.")


class LanguageModelLoss(nn.Module):
    """A Hugging Face causal language model whose forward pass returns the loss instead of logits.

    Args:
        model: The causal language model, used as it is.
        tile: Tokens whose logits exist at a time.

    Raises:
        ValueError: The model changes its logits after the head (soft cap, scaling, bias), or needs its router's
            load-balancing loss, neither of which this loss does.
    """

    def __init__(self, model: PreTrainedModel, tile: int = 2048) -> None:
        super().__init__()
        check_head(model)
        self.model: PreTrainedModel = model
        self.tile: int = tile
        self.rope: RopeTables = RopeTables(model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        text_lengths: Tensor | None = None,
        short_losses: Tensor | None = None,
        weight_cap: float = 1.0,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses, weighted where `short_losses` are given, and each token's own loss, unweighted.

        Args:
            input_ids: (B, T).
            labels: (B, T), already shifted, -100 for no target.
            text_lengths: (B, T) tokens of each token's text where the row is shared or holds several, for a RoPE that
                follows the length.
            short_losses: (B, T), as for `tiled_cross_entropy`.
            weight_cap: As for `tiled_cross_entropy`.
            **inputs: What else the decoder takes: `position_ids`, `attention_context`.

        Returns:
            Scalar sum over all targets, and (B, T) losses, detached.
        """
        decoder, context = self.model.get_decoder(), inputs.get("attention_context")
        checked = context.asked_by_every_layer(self.model) if isinstance(context, AttentionContext) else nullcontext()
        with self.rope.at(text_lengths), checked:
            hidden = decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state  # (B, T, d)
        weight = self.model.get_output_embeddings().weight
        short = None if short_losses is None else short_losses.flatten()
        total, losses = tiled_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), self.tile, short, weight_cap
        )
        return total, losses.view(labels.shape)
