"""Scores of answers, over all, by length and by depth, each with its count and interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ultralong.evaluation.measures.intervals import bootstrap_mean, wilson, wilson_of_mean
from ultralong.evaluation.measures.result import PER_CENT, Part, Result
from ultralong.evaluation.tasks.samples import find_task

DEPTHS = 5
# RULER's bar: the score of Llama-2-7B-chat at 4K tokens (Hsieh et al. 2024, section 4).
EFFECTIVE_SCORE = 85.6


def grades(task: str, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The score of each answer, from 0 to 1.

    Args:
        task: Name of the test.
        records: Each with `outputs` (a list of texts) and `prediction` (a text).

    Raises:
        ValueError: No such test, no records, or a record that lacks one of the two or holds something else there.
    """
    found = find_task(task)
    if not records:
        raise ValueError("There are no predictions to score.")
    scores = []
    for number, record in enumerate(records, 1):
        _check_record(number, record)
        try:
            scores.append(found.grade(record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Record {number} cannot be scored as {task}: {error}.") from error
    return scores


def _check_record(number: int, record: Mapping[str, Any]) -> None:
    """References are texts in a list: a single text would be compared letter by letter, a number not at all."""
    missing = [key for key in ("prediction", "outputs") if record.get(key) is None]
    if missing:
        raise ValueError(
            f"Record {number} has no {' and no '.join(missing)}: each needs `prediction` (the model's answer) beside "
            "the sample's own `outputs` (a list of texts)."
        )
    if not isinstance(record["prediction"], str):
        raise ValueError(f"Record {number}: prediction must be a text, found {_kind(record['prediction'])}.")
    outputs = record["outputs"]
    if not isinstance(outputs, list | tuple):
        raise ValueError(f"Record {number}: outputs must be a list of texts, found {_kind(outputs)}.")
    wrong = [item for item in outputs if not isinstance(item, str)]
    if wrong:
        raise ValueError(f"Record {number}: outputs must be a list of texts, found {_kind(wrong[0])} in it.")
    if not any(item.strip() for item in outputs):  # which is found in every answer
        raise ValueError(f"Record {number} has no references in outputs.")
    length = record.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"Record {number}: max_length must be a number of tokens, found {_kind(length)}.")
    depth, positions = record.get("depth"), record.get("positions")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1):
        raise ValueError(f"Record {number}: depth must be a number from 0 to 1, found {_kind(depth)}.")
    if positions is not None and not isinstance(positions, list | tuple):
        raise ValueError(f"Record {number}: positions must be a list of tokens' places, found {_kind(positions)}.")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def score_predictions(task: str, records: Sequence[Mapping[str, Any]], *, seed: int = 0, level: float = 0.95) -> Result:
    """Score answers, over all, by length, and by length and depth.

    Args:
        task: Name of the test.
        records: Each with `outputs` and `prediction`; `max_length` gives scores by length, and `depth` beside one
            place in `positions` scores by depth, in fifths.
        seed: Seed of the bootstrap, which scores between right and wrong take; the others take Wilson's interval.
        level: Confidence of the intervals, two-sided.

    Returns:
        The score in per cent. An interval is None below two samples.

    Raises:
        ValueError: As for `grades`.
    """
    scores = grades(task, records)
    graded = list(zip(records, scores, strict=True))

    def parts(key: Callable[[Mapping[str, Any]], tuple[Any, ...] | None]) -> tuple[Part, ...]:
        groups: dict[tuple[Any, ...], list[float]] = {}
        for record, score in graded:
            place = key(record)
            if place is not None:
                groups.setdefault(place, []).append(score)
        return tuple(
            Part(*_mean(groups[place], seed, level), length=place[0], depth=place[1]) for place in sorted(groups)
        )

    value, n, low, high = _mean(scores, seed, level)
    by_length = parts(lambda record: None if record.get("max_length") is None else (record["max_length"], None))
    return Result(find_task(task).name, "score", value, n, PER_CENT, "samples", low, high, by_length, parts(_fifth))


def _fifth(record: Mapping[str, Any]) -> tuple[int, float] | None:
    """Length and middle of the fifth of the depth; None where the answer does not rest on one place."""
    if record.get("max_length") is None or record.get("depth") is None or len(record.get("positions") or ()) != 1:
        return None
    fifth = min(int(record["depth"] * DEPTHS), DEPTHS - 1)
    return record["max_length"], (fifth + 0.5) / DEPTHS


def _mean(scores: Sequence[float], seed: int, level: float) -> tuple[float, int, float | None, float | None]:
    """Mean in per cent, count and interval."""
    if len(scores) < 2:
        return 100 * float(np.mean(scores)), len(scores), None, None
    if set(scores) <= {0.0, 1.0}:
        # Right or wrong is a proportion: a bootstrap of 20 right answers out of 20 would claim certainty.
        low, high = wilson(int(sum(scores)), len(scores), level)
    elif len(set(scores)) == 1:
        low, high = wilson_of_mean(scores[0], len(scores), level)  # equal partial scores say nothing about the spread
    else:
        low, high = bootstrap_mean(scores, seed=seed, level=level)
    return 100 * float(np.mean(scores)), len(scores), 100 * low, 100 * high


def mean_by_length(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Unweighted mean over tests at each length, as RULER averages.

    Returns:
        One dictionary a length: `length`, `tasks` (over how many), `score` (per cent).
    """
    values: dict[int, list[float]] = {}
    for result in results:
        for part in result.by_length:
            values.setdefault(int(part.length or 0), []).append(part.value)
    return [
        {"length": length, "tasks": len(values[length]), "score": float(np.mean(values[length]))}
        for length in sorted(values)
    ]


def effective_length(means: Sequence[Mapping[str, Any]], bar: float = EFFECTIVE_SCORE) -> int | None:
    """The longest length up to which every mean score reaches the bar; None where the shortest does not.

    RULER calls the longest length above the bar effective; a model that dips below in between is not given the rest.
    """
    reached = None
    for mean in sorted(means, key=lambda mean: mean["length"]):
        if mean["score"] < bar:
            break
        reached = mean["length"]
    return reached
