"""Which documents, how often: the length rule, copies and budgets, decided for each document by a hash of its id.

Fu et al. (2024, arXiv 2402.10171) keep, inside each source, one in ten documents shorter than 4,096 tokens, so that
long ones weigh more without changing the mix of sources; a token is estimated as 3.68 characters. UltraLong (arXiv
2504.06214) also up-samples documents longer than 8,192 tokens, at a rate it does not give. Both are settings here.

A document's fate depends on the seed and its id alone: not on its neighbours, on the number of workers, or on where a
run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ultralong.data.read.documents import Document

FU_CHARACTERS_PER_TOKEN = 3.68
BUCKETS = (4096, 8192, 32768, 131072)


@dataclass(frozen=True)
class LengthRule:
    """Rates by length. The defaults are Fu et al.'s; `long_copies` above 1 adds UltraLong's up-sampling.

    Attributes:
        short_below: A document of fewer tokens is short.
        short_keep: Share of short documents that is kept.
        long_above: A document of more tokens is long.
        long_copies: How often a long document is taken on average: 2.5 takes half of them twice and half three times.
    """

    short_below: int = 4096
    short_keep: float = 0.1
    long_above: int = 8192
    long_copies: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.short_below <= self.long_above:
            raise ValueError(f"short_below {self.short_below} must lie in 0..long_above {self.long_above}.")
        if not 0 <= self.short_keep <= 1:
            raise ValueError(f"short_keep must lie in 0..1, found {self.short_keep}.")
        if self.long_copies < 0:
            raise ValueError(f"long_copies must be 0 or more, found {self.long_copies}.")

    def expected(self, tokens: float) -> float:
        """How often a document of this many tokens is taken on average."""
        if tokens < self.short_below:
            return self.short_keep
        return self.long_copies if tokens > self.long_above else 1.0


@dataclass
class LengthCounts:
    """Documents and estimated tokens by length bucket, before and after sampling.

    Attributes:
        edges: Where buckets end, in tokens.
        before: Documents and tokens of each bucket as read.
        after: The same as taken.
    """

    edges: tuple[int, ...] = BUCKETS
    before: dict[str, list[int]] = field(init=False)
    after: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.after = (
            {name: [0] * (len(self.edges) + 1) for name in ("documents", "tokens")} for _ in range(2)
        )

    def add(self, tokens: float, copies: int, read: int = 1) -> None:
        """Count a document that was read `read` times and is taken `copies` times."""
        bucket = next((number for number, edge in enumerate(self.edges) if tokens < edge), len(self.edges))
        for table, times in ((self.before, read), (self.after, copies)):
            table["documents"][bucket] += times
            table["tokens"][bucket] += times * round(tokens)

    def as_json(self) -> dict[str, Any]:
        """Both tables, and the edges of the buckets in tokens."""
        return {"edges": list(self.edges), "before": self.before, "after": self.after}


def uniform(seed: int, id: str) -> float:
    """A number in [0, 1) that belongs to a seed and an id."""
    digest = hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: what a double holds exactly


def copies(expected: float, seed: int, id: str) -> int:
    """How often this document is taken: the whole part of `expected`, and once more for its share of ids."""
    whole = math.floor(expected)
    return whole + (uniform(seed, id) < expected - whole)


class _Taking:
    """The rule and the budget of one source, document by document."""

    def __init__(
        self,
        rule: LengthRule | None,
        seed: int,
        characters_per_token: float,
        budget: float | None,
        counts: LengthCounts | None,
    ) -> None:
        if characters_per_token <= 0 or (budget is not None and budget <= 0):
            raise ValueError(f"characters_per_token {characters_per_token} and budget {budget} must be positive.")
        self.rule, self.seed, self.ratio = rule, seed, characters_per_token
        self.budget, self.counts = None if budget == math.inf else budget, counts
        self.taken = 0.0

    @property
    def full(self) -> bool:
        return self.budget is not None and self.taken >= self.budget

    def copies_of(self, document: Document) -> Iterator[Document]:
        """The document as often as it is taken."""
        tokens = len(document.text) / self.ratio
        times = copies(self.rule.expected(tokens) if self.rule is not None else 1.0, self.seed, document.id)
        if self.budget is not None and times:
            times = min(times, math.ceil((self.budget - self.taken) / tokens))
        if self.counts is not None:
            self.counts.add(tokens, times)
        for number in range(1, times + 1):
            yield document if number == 1 else replace(document, id=f"{document.id}#{number}")
        self.taken += times * tokens


def sample(
    documents: Iterable[Document],
    *,
    rule: LengthRule | None = None,
    seed: int = 0,
    characters_per_token: float = FU_CHARACTERS_PER_TOKEN,
    budget: float | None = None,
    counts: LengthCounts | None = None,
) -> Iterator[Document]:
    """Apply the length rule and one source's budget.

    Args:
        documents: The source's documents.
        rule: None takes each once.
        seed: With a document's id, decides on it.
        characters_per_token: Turns characters into the tokens that the rule and the budget speak of.
        budget: Stop with the document that reaches this many tokens (the source is exceeded by one document at most).
        counts: Where lengths before and after are counted.

    Yields:
        The documents taken; a second copy's id ends in `#2`, a third's in `#3`.

    Raises:
        ValueError: `characters_per_token` or `budget` is not positive.
    """
    taking = _Taking(rule, seed, characters_per_token, budget, counts)
    for document in documents:
        yield from taking.copies_of(document)
        if taking.full:
            return


def sample_subsets(
    documents: Iterable[Document],
    budgets: Mapping[str, float],
    *,
    rule: LengthRule | None = None,
    seed: int = 0,
    characters_per_token: float | Mapping[str, float] = FU_CHARACTERS_PER_TOKEN,
    counts: Mapping[str, LengthCounts] | None = None,
) -> Iterator[Document]:
    """The same for a stream in which several sources are mixed, each with its own budget, as Fu et al. (2024) do it.

    A document whose source has its budget is passed over, whatever its length; the stream ends when all have theirs.

    Args:
        documents: Each with the name of its source.
        budgets: Tokens of each source.
        rule: As for `sample`.
        seed: As for `sample`.
        characters_per_token: As for `sample`, or one for each source.
        counts: For each source, where lengths before and after are counted; what is passed over is not.

    Raises:
        ValueError: As for `sample`.
    """
    if isinstance(characters_per_token, Mapping):
        rates = characters_per_token
    else:
        rates = dict.fromkeys(budgets, float(characters_per_token))
    takings = {
        name: _Taking(rule, seed, rates[name], budget, counts[name] if counts is not None else None)
        for name, budget in budgets.items()
    }
    for document in documents:
        taking = takings[document.source]
        if taking.full:
            continue
        yield from taking.copies_of(document)
        if taking.full and all(other.full for other in takings.values()):
            return
