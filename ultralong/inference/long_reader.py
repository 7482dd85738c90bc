"""Read prompts of up to millions of tokens over one or several GPUs, and decode greedily with the cache left there.

B batch, T prompt tokens, V vocabulary, P processes.

Every process calls the same methods with the same prompts; all get the same tokens. Memory is bounded: chunks bound the
activations, logits are made for the last token alone, and the cache is made once (`ultralong.inference.kv_store`).
"""

from __future__ import annotations

import inspect
import math

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.attention.collectives import Group
from ultralong.inference.cached_attention import CachedAttention
from ultralong.inference.generate import end_tokens, greedy
from ultralong.inference.kv_store import KvStore
from ultralong.utils.progress import progress

CHUNK = 65536  # tokens of a prompt that each GPU takes in one pass
SHOWN = 2 * CHUNK  # prompts from here on get a progress bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class LongReader:
    """A model with a cache that is shared out over the processes of a group.

    Args:
        model: A causal language model whose layers all see the whole text; every process has it whole. It is put into
            eval mode and onto `attn_implementation="ultralong"`.
        capacity: Most tokens of prompt and answer.
        group: The processes; None is this one alone.
        kv: Type of keys and values: `auto` as the model's, `fp8` half of it.
        chunk: Tokens of one pass over all processes; None takes 65,536 a process.
        kernel: Name of the attention kernel, or `auto`.
        quiet: True draws no progress bar.

    Raises:
        ValueError: A model with sliding windows or other special layers, a chunk below one token, or another `kv`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        group: Group | None = None,
        *,
        kv: str = "auto",
        chunk: int | None = None,
        kernel: str = "auto",
        quiet: bool = False,
    ) -> None:
        check_model(model)
        if chunk is not None and chunk < 1:
            raise ValueError(f"A prefill chunk must hold at least one token, got {chunk}.")
        ranks = 1 if group is None else dist.get_world_size(group)
        group = None if ranks == 1 else group
        self.model, self.capacity, self.group, self.quiet = model.eval(), capacity, group, quiet
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        self.chunk = CHUNK * ranks if chunk is None else chunk
        # A kept beginning that ends inside a chunk may lie unevenly, by a piece of the zigzag.
        spare = math.ceil(self.chunk / (2 * ranks)) if ranks > 1 else 0
        self.context = CachedAttention(KvStore(self._share(capacity, ranks) + spare, kv), group, kernel)
        self.reused = 0
        self._ids: Tensor | None = None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt, going on from where it differs from the last one.

        Args:
            input_ids: (B, T) prompts of one length, the same on every process.

        Returns:
            (B, V) logits of the last token, the same on every process.

        Raises:
            ValueError: An empty prompt, or one longer than the capacity.
        """
        tokens = input_ids.shape[1]
        if not 1 <= tokens <= self.capacity:
            raise ValueError(f"A prompt of {tokens:,} tokens was given, and there is room for 1 to {self.capacity:,}.")
        self.reused = self._common(input_ids)
        self.context.keep_first(self.reused)
        self._ids = None  # until this prompt is read whole
        starts = range(self.reused, tokens, self.chunk)
        logits = None
        with progress(
            total=_work(tokens) - _work(self.reused),
            desc=f"reading {tokens:,} tokens",
            bar_format=BAR,
            quiet=self.quiet or tokens - self.reused < SHOWN or self.context.rank > 0,
        ) as bar:
            for start in starts:
                stop = min(start + self.chunk, tokens)
                logits = self._pass(input_ids[:, start:stop])
                if not bar.disable and logits.is_cuda:
                    torch.cuda.synchronize()  # the bar shall show what is done, not what is queued
                bar.update(_work(stop) - _work(start))
        assert logits is not None
        self._ids = input_ids.clone()
        return self._from_owner(logits)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Logits (B, V) behind one more token (B, 1)."""
        return self._pass(token)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, stop: set[int] | None = None) -> list[list[int]]:
        """Continue each prompt with the most likely token at each step.

        Args:
            input_ids: (B, T) prompts of one length, the same on every process.
            max_new_tokens: Most tokens to add to each.
            stop: Ids that end a sequence; None takes the model's own.

        Returns:
            For each prompt its new tokens, without the id that ended it; the same on every process.

        Raises:
            ValueError: `max_new_tokens` below 1, or too little room for prompt and answer.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if input_ids.shape[1] + max_new_tokens > self.capacity:
            raise ValueError(
                f"There is room for {self.capacity:,} tokens; a prompt of {input_ids.shape[1]:,} and "
                f"{max_new_tokens:,} new tokens do not fit."
            )
        stop = end_tokens(self.model) if stop is None else stop
        first = self._agreed(self.prefill(input_ids))
        answers = greedy(first, lambda last: self._agreed(self.step(last)), max_new_tokens, stop)
        self.context.keep_first(input_ids.shape[1])
        return answers

    def _pass(self, ids: Tensor) -> Tensor:
        """Run tokens (B, t) that every process has through the model; logits (B, V) of the last, right at its owner."""
        context = self.context
        context.begin(ids.shape[1])
        _, place = context.last()
        out = self.model(
            input_ids=context.shard(ids),
            position_ids=context.positions(ids.device),
            use_cache=False,
            attention_context=context,
            logits_to_keep=torch.tensor([place], device=ids.device),
        )
        self._owner = context.last()[0]
        context.end()
        return out.logits[:, -1]

    def _from_owner(self, logits: Tensor) -> Tensor:
        """The last token's logits, from who holds it to all."""
        if self.group is not None:
            logits = logits.contiguous()
            dist.broadcast(logits, dist.get_global_rank(self.group, self._owner), group=self.group)
        return logits

    def _agreed(self, logits: Tensor) -> Tensor:
        """The most likely token (B, 1), the first process's word for it."""
        token = logits.argmax(-1, keepdim=True)
        if self.group is not None:
            dist.broadcast(token, dist.get_global_rank(self.group, 0), group=self.group)
        return token

    def _common(self, input_ids: Tensor) -> int:
        """Tokens that these prompts and the last ones begin with, all but the last one at most."""
        if self._ids is None or len(self._ids) != len(input_ids):
            return 0
        size = min(self._ids.shape[1], input_ids.shape[1] - 1)
        differ = torch.nonzero((self._ids[:, :size] != input_ids[:, :size]).any(0))
        common = int(differ[0]) if len(differ) else size
        # Begin anew where so much of it lies here that what follows would not fit.
        follows = self._share(self.capacity - common, self.context.ranks)
        return common if max(self.context.held(common)) + follows <= self.context.store.capacity else 0

    def _share(self, tokens: int, ranks: int) -> int:
        """Most tokens of so many that one process takes, two more a chunk where the chunk does not divide."""
        return math.ceil(tokens / ranks) + (2 * (math.ceil(tokens / self.chunk) + 1) if ranks > 1 else 0)


def _work(tokens: int) -> float:
    """What reading so many tokens costs, for the time that is left: matrix products, and attention to all before."""
    return tokens * (tokens + 2.0 * CHUNK)


def check_model(model: PreTrainedModel) -> None:
    """See that a model can be read with a cache of our own.

    Raises:
        ValueError: Some layer does not see the whole text, or the model takes no chosen logits.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} can't leave out the logits of all but the last tokens: several GPUs, "
            "8-bit keys and values and batches are for models that can. Use --gpus 1 --batch 1."
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or window is not None:
        found = ", ".join(sorted(kinds)) or f"a sliding window of {window}"
        raise ValueError(
            f"{type(model).__name__} has {found}: several GPUs, 8-bit keys and values and batches are for "
            "models whose layers all see the whole text. Leave --gpus, --kv and --batch away."
        )
