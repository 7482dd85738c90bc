"""vLLM behind the engines' interface."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.inference.decoding import GREEDY, FinishReason, Sampling
from ultralong.inference.engines import Answer, as_text
from ultralong.inference.stop_tokens import turn_end_tokens


def require_vllm() -> ModuleType:
    """The module of vLLM.

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


class VllmEngine:
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
        self.tokenizer, self._turn_ends = tokenizer, sorted(turn_end_tokens(tokenizer))
        options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": True, "kv_cache_dtype": kv_dtype}
        if chunk is not None:
            options["max_num_batched_tokens"] = chunk
        self._model = self._vllm.LLM(model=model, max_model_len=length, tensor_parallel_size=gpus, seed=0, **options)

    def max_batch(self, capacity: int) -> int:
        """See `Engine`."""
        return 1

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Collection[int] | None = None,
    ) -> list[Answer]:
        """See `Engine`: one after the other."""
        options: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.temperature:
            options |= {"top_p": sampling.top_p, "seed": sampling.seed}
        # vLLM ends at the model's own end tokens too, unless told to ignore them.
        options |= {"stop_token_ids": self._turn_ends if stop is None else list(stop), "ignore_eos": stop is not None}
        answers = []
        for prompt, budget in zip(prompts, max_new_tokens, strict=True):
            wanted = self._vllm.SamplingParams(max_tokens=budget, **options)
            (done,) = self._model.generate([{"prompt_token_ids": list(prompt)}], wanted, use_tqdm=False)
            reason: FinishReason = "stop" if done.outputs[0].finish_reason == "stop" else "length"
            tokens = tuple(done.outputs[0].token_ids)
            tokens = tokens[:-1] if reason == "stop" else tokens  # vLLM's last token is the one that ended them
            answers.append(Answer(as_text(self.tokenizer, tokens), tokens, reason, done.num_cached_tokens or 0))
        return answers

    def release(self) -> None:
        """See `Engine`: vLLM keeps its memory."""
