"""Samples made ahead by other processes, so that a model does not wait for its prompts."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.tasks.samples import make_samples
from ultralong.utils.processes import WorkerPool, result_of

Pair = tuple[str, int]


class SamplePrefetch:
    """Samples of several tests at several lengths: made here when they are asked for, or ahead by other processes.

    Use it in a `with` block. Ahead, all samples of a run are held in memory (about 5 bytes a token).

    Args:
        tokenizer: As for `make_samples`.
        wanted: For each test and length the first sample's number and how many are wanted.
        seed: As for `make_samples`.
        workers: Processes; 0 makes samples one by one where they are asked for.
        questions: For tests on published questions: name of the test to its file.
        lenient: Leave out the rest of a test and length whose next sample cannot be made, instead of stopping.
        **options: `chat` and `haystack` of `make_samples`.

    Attributes:
        failed: The reason of each test and length that was left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        wanted: Mapping[Pair, tuple[int, int]],
        seed: int,
        *,
        workers: int = 0,
        questions: Mapping[str, Any] | None = None,
        lenient: bool = False,
        **options: Any,
    ) -> None:
        self.failed: dict[Pair, str] = {}
        self._lenient = lenient
        self._wanted = {pair: (first, count) for pair, (first, count) in wanted.items() if count > 0}
        self._make = functools.partial(_make, tokenizer, seed, dict(questions or {}), options, tuple(wanted))
        self._pool: WorkerPool | None = None
        self._futures: dict[Pair, Future[tuple[list[dict[str, Any]], str | None]]] = {}
        if workers > 0 and self._wanted:
            self._pool = WorkerPool(workers)
            self._futures = {
                pair: self._pool.submit(_make_list, self._make, pair, *place) for pair, place in self._wanted.items()
            }

    def __enter__(self) -> SamplePrefetch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def of(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """The samples of these tests and lengths, one after the other.

        Raises:
            ValueError: As for `make_samples`.
        """
        for pair in pairs:
            try:
                if pair in self._futures:
                    yield from _checked(result_of(self._futures.pop(pair)))
                elif pair in self._wanted:
                    yield from self._make(pair, *self._wanted[pair])
            except ValueError as error:
                if not self._lenient:
                    raise
                self.failed[pair] = str(error)


def _checked(found: tuple[list[dict[str, Any]], str | None]) -> Iterator[dict[str, Any]]:
    """What another process could make, then why it could make no more."""
    yield from found[0]
    if found[1] is not None:
        raise ValueError(found[1])


def _make(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    questions: Mapping[str, Any],
    options: Mapping[str, Any],
    pairs: Sequence[Pair],
    pair: Pair,
    first: int,
    count: int,
) -> Iterator[dict[str, Any]]:
    task, length = pair
    asked = {"questions": questions.get(task), "above": length_below(pairs, pair), **options}
    return make_samples(task, tokenizer, length, count, seed, first=first, **asked)


def length_below(pairs: Iterable[Pair], pair: Pair) -> int:
    """The next shorter length at which a run asks the test of a pair; 0 where there is none."""
    return max((length for task, length in pairs if task == pair[0] and length < pair[1]), default=0)


def _make_list(make: Any, pair: Pair, first: int, count: int) -> tuple[list[dict[str, Any]], str | None]:
    """Samples, and why there are no more of them; None where all were made."""
    made: list[dict[str, Any]] = []
    try:
        made.extend(make(pair, first, count))
    except ValueError as error:
        return made, str(error)
    return made, None
