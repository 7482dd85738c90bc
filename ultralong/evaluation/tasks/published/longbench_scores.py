"""Scores of LongBench v2 and LongBench Pro, one answer at a time, from 0 to 1; see `longbench` for their sources."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence

PRO_MARKS = ("[Answer]", "[\u7b54\u6848]")


def _lines(answer: str) -> list[str]:
    """The answers that a model listed: one a line behind the last mark, in lower case, white space collapsed."""
    for mark in PRO_MARKS:
        if mark in answer:
            answer = answer.rpartition(mark)[2]
            break
    return _plain(answer.strip().split("\n"))


def _plain(texts: Sequence[str]) -> list[str]:
    return [" ".join(text.lower().split()) for text in texts]


def first_line(said: Sequence[str], right: Sequence[str]) -> float:
    """Accuracy: the first line is the first reference."""
    return float(bool(said) and said[0] == right[0])


def share_found(said: Sequence[str], right: Sequence[str]) -> float:
    """SubEM: share of the references that are a line of the answer."""
    return sum(reference in said for reference in right) / len(right)


def set_f1(said: Sequence[str], right: Sequence[str]) -> float:
    """F1 between the lines and the references as sets."""
    common = len(set(said) & set(right))
    return 2 * common / (len(set(said)) + len(set(right))) if common else 0.0


def pairwise_accuracy(said: Sequence[str], right: Sequence[str]) -> float:
    """Pairs of references that stand in their order in the answer, over all pairs of lines of the answer."""
    if len(right) < 2 or len(said) < 2:
        return 0.0
    place = {line: number for number, line in enumerate(said)}
    pairs = itertools.combinations(right, 2)
    kept = sum(a in place and b in place and place[a] < place[b] for a, b in pairs)
    return min(1.0, kept / math.comb(len(said), 2))


def ndcg(said: Sequence[str], right: Sequence[str]) -> float:
    """NDCG at the number of references, whose gains fall by one from first to last; a repeated line counts once."""
    gains = {reference: len(right) - number for number, reference in enumerate(right)}
    once = list(dict.fromkeys(said))[: len(right)]
    found = sum(gains.get(line, 0) / math.log2(rank + 2) for rank, line in enumerate(once))
    best = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(sorted(gains.values(), reverse=True)))
    return found / best


# By the number in front of a task's name, as the official code assigns them.
PRO_SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    **dict.fromkeys(("T1.1", "T1.2"), ndcg),
    **dict.fromkeys(("T2.1", "T2.2", "T6.3"), pairwise_accuracy),
    **dict.fromkeys(("T3.1", "T3.2", "T11.1", "T11.2"), first_line),
    **dict.fromkeys(("T5.1", "T5.2", "T6.2", "T7.1", "T7.2", "T7.3", "T9.1", "T9.2"), set_f1),
    **dict.fromkeys(("T6.1", "T8.1", "T8.2", "T8.3", "T10.1", "T10.2"), share_found),
}


def pro_score(answer: str, references: Sequence[str], subtask: str | None = None) -> float:
    """LongBench Pro's score of an answer, by the rule of its task.

    Args:
        answer: What the model said.
        references: The right lines, in order.
        subtask: Name of the task, such as `T3.2 Single-Hop Fact QA`.

    Raises:
        ValueError: No such task, or one of summaries.
    """
    rule = PRO_SCORES.get((subtask or "").split(" ")[0])
    if rule is None:
        raise ValueError(f"there is no rule for the task {subtask!r}")
    return rule(_lines(answer), _plain(references)) if answer.strip() else 0.0


def v2_score(answer: str, references: Sequence[str], answer_prefix: str | None = None) -> float:
    """LongBench v2's: the letter behind "The correct answer is", in brackets first, is the right one.

    Args:
        answer: What the model said.
        references: The right letter.
        answer_prefix: Start of the answer in the prompt, which is read with it.
    """
    text = ((answer_prefix or "") + answer).replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is \(?([A-D])", text
    )
    return float(found is not None and found.group(1) == references[0])
