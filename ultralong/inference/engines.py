"""Engines: what answers prompts. transformers' models with this library's runners behind one interface, as is vLLM.

Answers of two engines differ a little even for the same weights (kernels round differently), so one comparison keeps to
one engine; every answer says which gave it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.inference.batched import BatchedRunner, batch_that_fits
from ultralong.inference.decode_step.step import is_fast
from ultralong.inference.decoding import GREEDY, FinishReason, Generated, Sampler, Sampling, Step, collect
from ultralong.inference.generate import stream
from ultralong.inference.kv_cache import KvCache
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.runner import CachedRunner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.inference.stop_tokens import stop_tokens


@dataclass(frozen=True)
class Answer:
    """What an engine said in reply to a prompt.

    Attributes:
        text: The new tokens as text, special tokens left out.
        tokens: The new tokens, without the one that ended them.
        finish_reason: `stop` where a stop token ended them, `length` where the budget did.
        reused: How many of the prompt's tokens had been read before.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    reused: int = 0


def as_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Tokens of one answer as text, special tokens left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Engine(Protocol):
    """Answers prompts.

    Attributes:
        name: What is written beside its answers.
    """

    name: str

    def max_batch(self, capacity: int) -> int:
        """How many prompts to give at once, when the longest takes `capacity` tokens with its answer."""
        ...

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Collection[int] | None = None,
    ) -> list[Answer]:
        """Answer prompts.

        Args:
            prompts: Token ids; at most `max_batch` of them for speed.
            max_new_tokens: Most tokens to add to each.
            capacity: Most tokens of any prompt and its answer in a row of calls, so that memory is kept between them.
            sampling: How tokens are chosen.
            stop: Ids that end an answer; None takes the model's own and those that end a turn of the chat template.
        """
        ...

    def release(self) -> None:
        """Give the memory of the KV cache back. The engine can still be asked."""
        ...


class StreamingEngine(Engine, Protocol):
    """An engine that also hands out an answer token by token."""

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """Answer one prompt step by step; to close the iterator stops the work. Arguments as for `answer`."""
        ...


class RunnerEngine(ABC):
    """What engines share that decode with runners of this library.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.

    Attributes:
        ranks: Processes that read a prompt together.
    """

    _runner: CachedRunner
    ranks = 1

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.stop = model.eval(), tokenizer, stop_tokens(model, tokenizer)

    def max_batch(self, capacity: int) -> int:
        """See `Engine`: one, unless an engine batches."""
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
        """See `Engine`: one after the other, unless an engine batches."""
        answers = []
        for prompt, budget in zip(prompts, max_new_tokens, strict=True):
            steps = self.stream(prompt, budget, capacity=capacity, sampling=sampling, stop=stop)
            (generated,) = collect(steps, 1)
            answers.append(self._answer(generated, self.reused))
        return answers

    def _answer(self, generated: Generated, reused: int) -> Answer:
        text = as_text(self.tokenizer, generated.tokens)
        return Answer(text, tuple(generated.tokens), generated.finish_reason, reused)

    @property
    def reused(self) -> int:
        """Tokens of the last prompt that had been read before."""
        return self._runner.reused

    @abstractmethod
    def release(self) -> None:
        """See `Engine`."""

    @property
    def interrupted(self) -> Callable[[], bool]:
        """Asked between the chunks of a prompt; True leaves it with `Interrupted`."""
        return self._runner.interrupted

    @interrupted.setter
    def interrupted(self, asked: Callable[[], bool]) -> None:
        self._runner.interrupted = asked

    @property
    def most(self) -> int:
        """Most tokens of any prompt with its answer, up to which a chat's cache grows in steps; 0 where not known."""
        return self._runner.most

    @most.setter
    def most(self, tokens: int) -> None:
        self._runner.most = tokens

    @property
    def store(self) -> KvCache | None:
        """Keys and values of the answer under way, to go on with in a batch; None where it can't take them."""
        return self._runner.store

    def extend(self, tokens: Sequence[int]) -> None:
        """Count tokens of that answer that were read elsewhere, and whose keys and values are in `store` now."""
        self._runner.extend(tokens)

    @abstractmethod
    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        capacity: int | None = None,
        sampling: Sampling | Sampler = GREEDY,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """See `StreamingEngine`."""


class LocalEngine(RunnerEngine):
    """A transformers model on one device: many short prompts together, or one after the other, read in chunks.

    One after the other, keys and values are reused from prompt to prompt as far as both begin alike.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.
        chunk: Tokens of one prefill pass; None takes a prompt at once.
        batch: Prompts to answer together; None takes as many as fit on a GPU (`batched.batch_that_fits`), one on a CPU.
        fused: Decode prompts that are answered alone by the fused step, where there is one for the model and its device
            (`decode_step.step.is_fast`); elsewhere it changes nothing. The model then has this library's attention.

    Raises:
        ValueError: A batch or a chunk below 1.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chunk: int | None = None,
        batch: int | None = None,
        *,
        fused: bool = False,
    ) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"A batch holds at least one prompt, got {batch}.")
        super().__init__(model, tokenizer)
        runner = ShardedRunner if fused and is_fast(model) else LocalRunner
        self.batch, self._runner = batch, runner(model, chunk=chunk, quiet=True)

    def max_batch(self, capacity: int) -> int:
        """See `Engine`."""
        self.release()  # its memory is what a batch may take
        return batch_that_fits(self.model, capacity, self.batch)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Collection[int] | None = None,
    ) -> list[Answer]:
        """See `Engine`: several prompts are answered together."""
        if len(prompts) == 1:
            return super().answer(prompts, max_new_tokens, capacity=capacity, sampling=sampling, stop=stop)
        stop = self.stop if stop is None else stop
        steps = stream(BatchedRunner(self.model), prompts, max_new_tokens, sampling=sampling, stop=stop)
        return [self._answer(generated, 0) for generated in collect(steps, len(prompts))]

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        capacity: int | None = None,
        sampling: Sampling | Sampler = GREEDY,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """See `StreamingEngine`."""
        self._runner.capacity = capacity
        stop = self.stop if stop is None else stop
        return stream(self._runner, [prompt], max_new_tokens, sampling=sampling, stop=stop)

    def release(self) -> None:
        """See `Engine`."""
        self._runner.release()
