"""Many prompts of unequal lengths answered together, with the outcome that each would have alone.

B prompts, T tokens, n tokens of a packed pass, H query heads, K kv heads, G = H / K, D head size, V vocabulary.

Decoding one token of one short prompt leaves nearly all of a GPU idle; decoding one of each of a hundred takes hardly
longer. Prompts are read packed end to end, as documents that do not see each other, so no token is padding; each one's
keys and values then lie in a row of the cache of their own, and every decoding step masks what a row does not hold.
Nothing is approximate: a row's result is that of the row alone, up to rounding. Where the model's RoPE follows the
length of the text (longrope, dynamic) and the prompts do not have the same frequencies, each has a runner of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.attention.kernels import choose_kernel
from ultralong.attention.scheme import Local
from ultralong.attention.spec import AttentionSpec, VarlenSegments
from ultralong.inference.kv_cache import KvCache
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.runner import Prompts
from ultralong.inference.sharded_generation import check_model
from ultralong.rope.tables import RopeTables

PACKED = 32768  # tokens of prompts that are read in one pass
BLOCK = 64  # rows are read up to a multiple of this: few shapes, and aligned ones
MEMORY_SHARE = 0.5  # of the free memory that caches may take


@dataclass
class Packed:
    """A pass over whole prompts: their segments, and each token's row and position (n,)."""

    segments: VarlenSegments
    rows: Tensor
    positions: Tensor


@dataclass
class OneEach:
    """A pass over one token of each row: where it is written (B,), and which tokens a row holds then (B, T)."""

    rows: Tensor
    positions: Tensor
    mask: Tensor
    bias: Tensor | None = None  # made by the first layer, the same for all


class BatchedAttention:
    """The `attention_context` of a model that reads rows of unequal lengths, each with a KV cache of its own.

    Args:
        rows: Prompts B.
        capacity: Most tokens of a prompt and its answer.
        device: Where the model is.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.cache = KvCache(-(-capacity // BLOCK) * BLOCK)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens held
        self._pass: Packed | OneEach | None = None

    def begin_prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Start a pass over whole prompts, packed end to end, into these rows; returns their positions (1, n)."""
        device = self.lengths.device
        sizes = torch.tensor(lengths, device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])  # (n,)
        edges = (0, *accumulate(lengths))
        places = torch.tensor(rows, device=device).repeat_interleave(sizes)
        self._pass = Packed(VarlenSegments(edges, edges), places, positions)
        self.lengths[list(rows)] = sizes
        return positions[None]

    def begin_token(self, going: Tensor, longest: int) -> Tensor:
        """Start a pass over one token of each row; returns their positions (B, 1).

        Args:
            going: (B,) bool, rows that go on, or the first of them; what the others write now is written over later.
            longest: Tokens of the longest row, the new one included.
        """
        device = self.lengths.device
        read = min(-(-longest // BLOCK) * BLOCK, self.cache.capacity)
        positions = self.lengths[: len(going)].clone()
        mask = torch.arange(read, device=device)[None] <= positions[:, None]  # (B, T)
        self._pass = OneEach(torch.arange(len(going), device=device), positions, mask)
        return positions[:, None]

    def end_token(self, going: Tensor) -> None:
        """Finish that pass: rows that go on hold one token more, which a pass that failed does not count."""
        self.lengths[: len(going)] += going

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
        """Attention within each prompt (1, n, H, D), or of one token of each row (B, 1, H, D); called by each layer.

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
        now = self._pass
        assert now is not None, "begin_prompts or begin_token comes before the model's call"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.cache.scatter(layer, len(self.lengths), now.rows, now.positions, k.flatten(0, 1), v.flatten(0, 1))
        if isinstance(now, OneEach):
            return self._attend_token(q, scale, layer, now)
        spec = AttentionSpec(scale=scale)
        kernel = choose_kernel("auto", q, spec.with_segments(now.segments))
        return Local(kernel, now.segments).attend(q, k, v, spec)[0]

    def _attend_token(self, q: Tensor, scale: float, layer: int, now: OneEach) -> Tensor:
        """(B, 1, H, D). The query heads of a kv head stand as its queries, so that no key is copied."""
        held = self.cache.read(layer, slice(now.mask.shape[1]))
        keys, values = (x[: len(q)].transpose(1, 2) for x in held)  # (B, K, T, D)
        queries = q[:, 0].unflatten(1, (keys.shape[1], -1))  # (B, K, G, D)
        if now.bias is None:
            now.bias = torch.zeros_like(now.mask, dtype=q.dtype).masked_fill_(~now.mask, float("-inf"))
        bias = now.bias[:, None, None].expand(-1, keys.shape[1], queries.shape[2], -1)  # (B, K, G, T)
        # cuDNN would make a plan for every length.
        chosen = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else nullcontext()
        with chosen:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        return out.flatten(1, 2)[:, None]


class BatchedRunner:
    """Reads and decodes many prompts of unequal lengths at once.

    Args:
        model: A causal language model whose layers all see the whole text; it is put into eval mode and onto
            `attn_implementation="ultralong"`.
        packed: Tokens of prompts that are read in one pass, at least one prompt.

    Raises:
        ValueError: A model with special layers.
    """

    reused = 0

    def __init__(self, model: PreTrainedModel, packed: int = PACKED) -> None:
        check_model(model, batches=True)
        self.model, self.packed = model.eval(), packed
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        self._context: BatchedAttention | None = None
        self._rope, self._shortest, self._longest = RopeTables(model), 0, 0
        self._alone: list[LocalRunner] = []  # of each prompt, where they do not share RoPE's frequencies

    @torch.no_grad()
    def prefill(self, prompts: Prompts, budgets: Sequence[int] = (0,)) -> Tensor:
        """See `Runner`: prompts of any lengths, each with its budget or all with one.

        Raises:
            ValueError: No prompt, or an empty one.
        """
        rows = [list(prompt) for prompt in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
        lengths = [len(prompt) for prompt in rows]
        if not min(lengths, default=0):
            raise ValueError("Batched answers need at least one prompt, and a token in each.")
        budgets = list(budgets) * len(rows) if len(budgets) == 1 else budgets
        self.release()  # the old buffers go before the new ones come
        rooms = [length + budget for length, budget in zip(lengths, budgets, strict=True)]
        capacity, self._shortest = max(rooms), min(lengths)
        if not self._rope.same(self._shortest, capacity):
            self._alone = [LocalRunner(self.model, room, chunk=self.packed) for room in rooms]
            return torch.cat([runner.prefill([row]) for runner, row in zip(self._alone, rows, strict=True)])
        self._context, self._longest = BatchedAttention(len(rows), capacity, self.model.device), max(lengths)
        return torch.cat([self._read(self._context, rows, part) for part in _passes(lengths, self.packed)])

    @torch.no_grad()
    def decode(self, tokens: Tensor, going: Sequence[bool] | None = None) -> Tensor:
        """See `Runner`."""
        if self._alone:
            return self._decode_alone(tokens, going)
        assert self._context is not None, "prefill comes first"
        moving = torch.ones_like(tokens, dtype=torch.bool) if going is None else torch.tensor(going).to(tokens.device)
        positions = self._context.begin_token(moving, self._longest + 1)
        logits = self._logits(self._context, tokens[:, None], positions, 1)[:, -1]
        self._context.end_token(moving)
        self._longest += 1
        return logits

    def _decode_alone(self, tokens: Tensor, going: Sequence[bool] | None) -> Tensor:
        moving = [True] * len(self._alone) if going is None else going
        logits = {row: self._alone[row].decode(tokens[row : row + 1]) for row, goes_on in enumerate(moving) if goes_on}
        nothing = torch.zeros_like(next(iter(logits.values())))  # for rows that have ended
        return torch.cat([logits.get(row, nothing) for row in range(len(self._alone))])

    def agree(self, tokens: Tensor) -> Tensor:
        """See `Runner`."""
        return tokens

    def abandon(self, tokens: Tensor, going: Sequence[bool]) -> None:
        """See `Runner`: a batch has no other ranks to tell."""

    def release(self) -> None:
        """See `Runner`."""
        self._context, self._alone = None, []

    def _read(self, context: BatchedAttention, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Read some prompts in one pass; logits (b, V) of each one's last token."""
        ids = torch.tensor([[token for row in rows for token in prompts[row]]], device=self.model.device)  # (1, n)
        lengths = [len(prompts[row]) for row in rows]
        positions = context.begin_prompts(rows, lengths)
        ends = torch.tensor(list(accumulate(lengths)), device=self.model.device) - 1
        return self._logits(context, ids, positions, ends)[0]

    def _logits(self, context: BatchedAttention, ids: Tensor, positions: Tensor, keep: int | Tensor) -> Tensor:
        """Logits of some positions, for ids and positions of one shape."""
        with self._rope.at(self._shortest):
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, attention_context=context, logits_to_keep=keep
            ).logits
        return logits


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
    if not RopeTables(model).same(1, capacity):
        return 1  # prompts that may not share frequencies
    try:
        check_model(model, batches=True)
    except ValueError:
        return 1
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        + torch.cuda.memory_reserved(model.device)
        - torch.cuda.memory_allocated(model.device)
    )
    return max(1, int(MEMORY_SHARE * free) // (cache_bytes(model) * (capacity + BLOCK)))


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in the model's type, over all layers."""
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * kv_heads * head_size * model.dtype.itemsize)


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
