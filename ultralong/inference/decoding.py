"""The decoding loop: from the logits of prompts to their answers, token by token, for every runner.

B batch, V vocabulary.

A token is read by the host before the next step is started: it may end the answer. A GPU then stands still from the end
of one step until the host has read, decided and started the next. A runner that decodes ahead (`RunsAhead`) is given
the token on the GPU first: the host reads it, and hands it out, while the step behind it runs. Where the answer ends
there, that step is taken back. Tokens are the same: they are drawn from the same logits in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ultralong.inference.runner import Runner

FinishReason = Literal["stop", "length"]
SMALLEST = torch.finfo(torch.float32).tiny
ABANDONED = -1  # in the place of a token: the first rank has stopped decoding


class NotANumber(ValueError):
    """A model's logits are NaN, whatever the prompt."""

    def __init__(
        self,
        message: str = "The model's logits are not numbers (NaN): a weight is NaN or infinite, or its type overflows.",
    ) -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits before a token is drawn; 0 takes the most likely one (greedy decoding).
        top_p: Draw only from the most likely tokens that together have this probability (nucleus sampling).
        seed: Seed of the draws; None draws one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")


GREEDY = Sampling()


class Sampler:
    """Chooses tokens from logits, with a random state of its own.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling
        self._random: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token (B,) of each row of logits (B, V)."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        if self._random is None:
            self._random = torch.Generator(logits.device)
            if self.sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.sampling.seed)
        scores = logits.float()
        # Relative to the best one: over a small temperature, scores as they are would be infinite, and their difference
        # no number. A temperature below float32's normal numbers would be 0.
        scores = (scores - scores.amax(-1, keepdim=True)) / max(self.sampling.temperature, SMALLEST)
        probabilities = scores.softmax(-1)
        if self.sampling.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            # A token stays while those before it have not reached top_p.
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            beyond[:, 0] = False  # though top_p may be 0 in float32
            ordered = ordered.masked_fill(beyond, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        return torch.multinomial(probabilities, 1, generator=self._random)[:, 0]


def sampler_of(sampling: Sampling | Sampler) -> Sampler:
    """A sampler as it is, or one of its own for a way of sampling."""
    return sampling if isinstance(sampling, Sampler) else Sampler(sampling)


class Step(NamedTuple):
    """One step of all rows.

    Attributes:
        tokens: For each row its new token; None where the row had ended or ends now by a stop token.
        ended: For each row why it ends with this step; None where it goes on or had ended before.
    """

    tokens: list[int | None]
    ended: list[FinishReason | None]


@runtime_checkable
class RunsAhead(Protocol):
    """A runner whose last step can be taken back.

    Attributes:
        ahead: Whether steps of a single row are to be started before the host has read their token.
    """

    ahead: bool

    def take_back(self) -> None:
        """Forget the token of the last `decode`, on every rank."""
        ...

    def abandon_ahead(self, tokens: Tensor, more: bool) -> None:
        """As `Runner.abandon` where the step behind these tokens has been started, on all ranks.

        Args:
            tokens: (1,) of that step.
            more: Whether the others will start one more before they read that they are abandoned.
        """
        ...


def decode(
    runner: Runner, logits: Tensor, budgets: Sequence[int], stop: Collection[int], sampler: Sampler
) -> Iterator[Step]:
    """Decode step by step until each row has met a stop token or has as many tokens as it may.

    Whoever leaves the iterator before its end stops the decoding, on other ranks too.

    Args:
        runner: Has read the prompts.
        logits: (B, V) of each prompt's last token.
        budgets: Most tokens of each row, one or more.
        stop: Tokens that end a row, and are not part of it.
        sampler: Chooses the tokens.

    Raises:
        ValueError: The logits are not numbers, of which the largest would be an answer like any other.
    """
    if logits.isnan().any():
        raise NotANumber
    going, steps = [True] * len(budgets), max(budgets)
    ahead = runner if isinstance(runner, RunsAhead) and runner.ahead and len(budgets) == 1 else None
    for step in range(steps):
        tokens = runner.agree(sampler(logits))
        started = ahead if step + 1 < steps else None
        values_of = tokens.tolist if started is None else _on_the_way(tokens)
        if started is not None:
            logits = runner.decode(tokens.clamp(min=0), going)  # ABANDONED is no token
        values = values_of()
        if values[0] == ABANDONED:
            if started is not None:
                started.take_back()
            return
        said, ended = _looked_at(values, step, budgets, stop, going)
        going = [goes_on and reason is None for goes_on, reason in zip(going, ended, strict=True)]
        if started is not None and not any(going):
            started.take_back()
        try:
            yield Step(said, ended)
        except GeneratorExit:
            if any(going) and started is not None:
                started.abandon_ahead(tokens, step + 2 < steps)
            elif any(going):
                runner.abandon(tokens, going)
            raise
        if not any(going):
            return
        if started is None:
            logits = runner.decode(tokens, going)


def _looked_at(
    values: Sequence[int], step: int, budgets: Sequence[int], stop: Collection[int], going: Sequence[bool]
) -> Step:
    """What a step's tokens say of each row that was going on."""
    ended: list[FinishReason | None] = [None] * len(budgets)
    said: list[int | None] = [None] * len(budgets)
    for row in (row for row, goes_on in enumerate(going) if goes_on):
        if values[row] in stop:
            ended[row] = "stop"
            continue
        said[row] = values[row]
        ended[row] = "length" if step + 1 == budgets[row] else None
    return Step(said, ended)


def _on_the_way(tokens: Tensor) -> Callable[[], list[int]]:
    """Start to copy tokens (B,) to the host. What returns them waits for that copy, not for work started after it."""
    if not tokens.is_cuda:
        return tokens.tolist
    # Only from a GPU to pinned memory is a copy that the host need not wait for.
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tokens.device))

    def values() -> list[int]:
        there.synchronize()
        found: list[int] = host.tolist()
        return found

    return values


@dataclass
class Generated:
    """What was said in reply to one prompt.

    Attributes:
        tokens: The new tokens, without the one that ended them.
        finish_reason: `stop` where a stop token ended them, `length` where there was no room for more.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def collect(steps: Iterable[Step], rows: int) -> list[Generated]:
    """The whole answer of each of so many rows."""
    answers = [Generated() for _ in range(rows)]
    for step in steps:
        for answer, token, reason in zip(answers, step.tokens, step.ended, strict=True):
            if token is not None:
                answer.tokens.append(token)
            if reason is not None:
                answer.finish_reason = reason
    return answers
