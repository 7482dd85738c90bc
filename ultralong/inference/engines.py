"""What answers a prompt: transformers with chunked prefill on this side, or vLLM behind the same interface.

Answers of two engines differ a little even for the same weights (kernels round differently), so one comparison keeps to
one engine; every answer says which gave it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.inference.batched import batch_that_fits, generate_together
from ultralong.inference.generate import generate_greedy
from ultralong.inference.shared_prefix import SharedPrefix


class Engine(Protocol):
    """Answers prompts greedily."""

    name: str

    def at_once(self, capacity: int) -> int:
        """How many prompts to give at once, when the longest takes `capacity` tokens with its answer."""
        ...

    def answer_many(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[str]:
        """Continue several prompts of any lengths, each by its own budget; asked only where `at_once` is above 1."""
        ...

    def answer(self, ids: Sequence[int], max_new_tokens: int, capacity: int) -> tuple[str, int]:
        """Continue a prompt.

        Args:
            ids: The prompt.
            max_new_tokens: Most tokens to add.
            capacity: Most tokens of any prompt and its answer in a row of calls, so that memory can be kept.

        Returns:
            What was said, special tokens left out, and how many of the prompt's tokens had been read before.
        """
        ...


class OneByOne:
    """What engines share that take one prompt at a time."""

    def at_once(self, capacity: int) -> int:
        """See `Engine`."""
        return 1

    def answer_many(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[str]:
        """See `Engine`."""
        raise NotImplementedError(f"{type(self).__name__} takes one prompt at a time.")


class OwnEngine:
    """transformers' model: many short prompts together, or one after the other, read in chunks.

    One after the other, keys and values are shared from prompt to prompt as far as both begin alike.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.
        chunk: Tokens of one prefill pass; None takes a prompt at once.
        batch: Prompts to answer together; None takes as many as fit on a GPU (`batched.batch_that_fits`), one on a CPU.

    Raises:
        ValueError: A batch below 1.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chunk: int | None = None,
        batch: int | None = None,
    ) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"A batch holds at least one prompt, got {batch}.")
        self.model, self.tokenizer, self.chunk, self.batch = model.eval(), tokenizer, chunk, batch
        self._shared: SharedPrefix | None = None

    def at_once(self, capacity: int) -> int:
        """See `Engine`."""
        self._shared = None  # its memory is what a batch may take
        return batch_that_fits(self.model, capacity, self.batch)

    def answer_many(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[str]:
        """See `Engine`."""
        said = generate_together(self.model, prompts, budgets)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]

    def answer(self, ids: Sequence[int], max_new_tokens: int, capacity: int) -> tuple[str, int]:
        """See `Engine`."""
        if self._shared is None or self._shared.capacity != capacity:
            # The old buffer goes before the new one is made.
            self._shared = None
            self._shared = SharedPrefix(self.model, capacity)
        prompt = torch.tensor([list(ids)], device=self.model.device)
        said = generate_greedy(self.model, prompt, max_new_tokens, chunk=self.chunk, shared=self._shared)[0]
        return self.tokenizer.decode(said, skip_special_tokens=True), self._shared.reused


def require_vllm() -> ModuleType:
    """VLLM.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        raise ImportError(
            "vllm is needed for this engine and is not installed. It pins the torch that it was "
            "built for: make an environment of its own (pip install vllm), install ultralong into "
            "that, or leave --engine away."
        ) from error


class VllmEngine(OneByOne):
    """vLLM, with its own prefix cache. It pins the torch that it was built for, so it lives where that fits.

    Args:
        model: Folder or hub id.
        tokenizer: Decodes the answers, as for every engine.
        length: Most tokens of prompt and answer.
        gpus: GPUs to split the model over.
        kv_dtype: Type of keys and values: auto, or fp8, which halves them.
        chunk: Tokens of one prefill step; None takes vLLM's.

    Raises:
        ImportError: vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        gpus: int = 1,
        kv_dtype: str = "auto",
        chunk: int | None = None,
    ) -> None:
        self._vllm = require_vllm()
        self.tokenizer = tokenizer
        options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": True, "kv_cache_dtype": kv_dtype}
        if chunk is not None:
            options["max_num_batched_tokens"] = chunk
        self._model = self._vllm.LLM(model=model, max_model_len=length, tensor_parallel_size=gpus, seed=0, **options)

    def answer(self, ids: Sequence[int], max_new_tokens: int, capacity: int) -> tuple[str, int]:
        """See `Engine`."""
        sampling = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        (done,) = self._model.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        said = self.tokenizer.decode(list(done.outputs[0].token_ids), skip_special_tokens=True)
        return said, done.num_cached_tokens or 0
