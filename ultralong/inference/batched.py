"""Many prompts of unequal length answered together, with the outcome that each would have alone.

B prompts, T tokens, n tokens of a packed pass, H query heads, K kv heads, G = H / K, D head size, C cache capacity, V
vocabulary.

Decoding one token of one short prompt leaves nearly all of a GPU idle; decoding one of each of a hundred takes hardly
longer. Prompts are read packed end to end, as documents that do not see each other, so no token is padding; each one's
keys and values then lie in a row of their own, and every decoding step masks what a row does not hold. Nothing is
approximate: a row's result is that of the row alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.attention.kernels import choose_kernel
from ultralong.attention.scheme import Local
from ultralong.attention.spec import AttentionSpec, VarlenSegments
from ultralong.inference.generate import end_tokens
from ultralong.inference.long_reader import check_model

PACKED = 32768  # tokens of prompts that are read in one pass
BLOCK = 64  # rows are read up to a multiple of this: few shapes, and aligned ones
SHARE = 0.5  # of the free memory that caches may take


class BatchedAttention:
    """What a model is given as `attention_context`: rows of unequal length, each with a cache of its own.

    Args:
        rows: Prompts B.
        capacity: Most tokens of a prompt and its answer.
        device: Where the model is.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens held
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # (B, K, C, D) each
        self._packed: VarlenSegments | None = None
        self._places: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None
        self._bias: Tensor | None = None

    def begin_prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Whole prompts come next, packed end to end into these rows; returns their positions (1, n)."""
        device = self.lengths.device
        self._packed = VarlenSegments(edges := (0, *accumulate(lengths)), edges)
        sizes = torch.tensor(lengths, device=device)
        position = torch.cat([torch.arange(length, device=device) for length in lengths])  # (n,)
        self._places = torch.tensor(rows, device=device).repeat_interleave(sizes), position
        self.lengths[list(rows)] = sizes
        return position[None]

    def begin_token(self, moving: Tensor, longest: int) -> Tensor:
        """One token a row comes next; rows (B,) bool that do not move are written over later. Positions (B, 1).

        Args:
            moving: Rows that go on.
            longest: Tokens of the longest row, the new one included.
        """
        self._packed = None
        self._places = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths.clone()
        read = min(-(-longest // BLOCK) * BLOCK, self.capacity)
        self._mask = torch.arange(read, device=self.lengths.device)[None] <= self.lengths[:, None]  # (B, T)
        self._bias = None
        self.lengths += moving
        return self._places[1][:, None]

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
        """Attention within each prompt (1, n, H, D), or of one token a row (B, 1, H, D); called by each layer.

        Args:
            q: Queries.
            k: Keys, with K heads.
            v: Values, likewise.
            scale: Factor on scores, 1 / sqrt(D) by default.
            window: Refused.
            softcap: Refused.
            sink: Refused.
            layer: The layer's number.

        Raises:
            ValueError: A sliding window, capped scores or sinks.
        """
        if window is not None or softcap or sink is not None:
            raise ValueError(
                "A model with sliding windows, capped scores or attention sinks can't answer in batches: "
                "ask for one prompt at a time (--batch 1)."
            )
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self._write(layer, k, v)
        if self._packed is not None:
            spec = AttentionSpec(scale=scale)
            kernel = choose_kernel("auto", q, spec.with_segments(self._packed))
            return Local(kernel, self._packed).attend(q, k, v, spec)[0]
        return self._attend_token(q, scale, layer)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer not in self._buffers:
            shape = (len(self.lengths), k.shape[2], self.capacity, k.shape[3])
            # Zeros, since what a row does not hold is multiplied by a weight of zero, which would not remove a NaN.
            self._buffers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        rows, positions = self._places
        for buffer, x in zip(self._buffers[layer], (k, v), strict=True):
            buffer[rows, :, positions] = x.flatten(0, 1)  # (n, K, D)

    def _attend_token(self, q: Tensor, scale: float, layer: int) -> Tensor:
        """(B, 1, H, D). The query heads of a kv head stand as its queries, so no key is copied."""
        keys, values = (x[:, :, : self._mask.shape[1]] for x in self._buffers[layer])  # (B, K, T, D)
        queries = q[:, 0].unflatten(1, (keys.shape[1], -1))  # (B, K, G, D)
        if self._bias is None:  # the same for all layers
            self._bias = torch.zeros_like(self._mask, dtype=q.dtype).masked_fill_(~self._mask, float("-inf"))
        bias = self._bias[:, None, None].expand(-1, keys.shape[1], queries.shape[2], -1)  # (B, K, G, T)
        # cuDNN would make a plan for every length.
        chosen = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else nullcontext()
        with chosen:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        return out.flatten(1, 2)[:, None]


def batch_that_fits(model: PreTrainedModel, capacity: int, batch: int | None) -> int:
    """How many prompts of up to `capacity` tokens to answer together.

    Args:
        model: Where it is, and how large its keys and values are, decides.
        capacity: Most tokens of a prompt and its answer.
        batch: The number, when it was asked for; None takes what fits into half of a GPU's free memory, and one on a
            CPU.

    Raises:
        ValueError: A batch below 1.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"A batch holds at least one prompt, got {batch}.")
    if batch is not None:
        return batch
    if model.device.type != "cuda" or capacity > PACKED:
        return 1
    try:
        check_model(model)
    except ValueError:
        return 1
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * kv_heads * head_size * model.dtype.itemsize * (capacity + BLOCK)
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        + torch.cuda.memory_reserved(model.device)
        - torch.cuda.memory_allocated(model.device)
    )
    return max(1, int(SHARE * free) // each)


@torch.no_grad()
def generate_together(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    *,
    stop: set[int] | None = None,
    packed: int = PACKED,
) -> list[list[int]]:
    """Continue each prompt with the most likely token at each step.

    Args:
        model: A causal language model whose layers all see the whole text; it is put into eval mode and onto
            `attn_implementation="ultralong"`.
        prompts: Ids of each prompt, of any lengths.
        budgets: Most tokens to add to each.
        stop: Ids that end a sequence; None takes the model's own.
        packed: Tokens of prompts that are read in one pass, at least one prompt.

    Returns:
        For each prompt its new tokens, without the id that ended it.

    Raises:
        ValueError: No or empty prompts, a budget below 1, or a model with special layers.
    """
    check_model(model)
    whole = len(prompts) == len(budgets) and all(len(prompt) for prompt in prompts)
    if not prompts or not whole or min(budgets) < 1:
        raise ValueError(
            "Batched answers need at least one prompt, a token in each, and a budget of one or more for each."
        )
    if model.eval().config._attn_implementation != attention.NAME:
        model.set_attn_implementation(attention.NAME)
    stop = end_tokens(model) if stop is None else stop
    lengths = [len(prompt) for prompt in prompts]
    context = BatchedAttention(len(prompts), max(a + b for a, b in zip(lengths, budgets, strict=True)), model.device)
    token = torch.cat([_read(model, context, prompts, rows) for rows in _passes(lengths, packed)])  # (B,)
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for step in range(max(budgets)):
        for row, value in enumerate(token.tolist()):
            if is_open[row] and value not in stop:
                answers[row].append(value)
            is_open[row] = is_open[row] and value not in stop and step + 1 < budgets[row]
        if not any(is_open):
            break
        moving = torch.tensor(is_open, device=model.device)
        positions = context.begin_token(moving, max(lengths) + step + 1)
        token = _logits(model, context, token[:, None], positions, 1)[:, -1].argmax(-1)
    return answers


def _passes(lengths: Sequence[int], packed: int) -> list[list[int]]:
    """Rows to read together: in order, up to so many tokens a pass."""
    passes: list[list[int]] = [[]]
    filled = 0
    for row, length in enumerate(lengths):
        if passes[-1] and filled + length > packed:
            passes.append([])
            filled = 0
        passes[-1].append(row)
        filled += length
    return passes


def _read(
    model: PreTrainedModel, context: BatchedAttention, prompts: Sequence[Sequence[int]], rows: Sequence[int]
) -> Tensor:
    """Read some prompts in one pass; the most likely next token of each, (b,)."""
    ids = torch.tensor([[token for row in rows for token in prompts[row]]], device=model.device)  # (1, n)
    lengths = [len(prompts[row]) for row in rows]
    positions = context.begin_prompts(rows, lengths)
    ends = torch.tensor(list(accumulate(lengths)), device=model.device) - 1
    return _logits(model, context, ids, positions, ends)[0].argmax(-1)


def _logits(model: PreTrainedModel, context: BatchedAttention, ids: Tensor, positions: Tensor, keep: Any) -> Tensor:
    """Logits of some positions, for ids and positions of one shape."""
    return model(
        input_ids=ids, position_ids=positions, use_cache=False, attention_context=context, logits_to_keep=keep
    ).logits
