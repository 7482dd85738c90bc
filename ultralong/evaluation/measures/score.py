"""Scores of answers, over all and length by length, each with its count and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ultralong.evaluation.measures.intervals import bootstrap_mean, wilson
from ultralong.evaluation.tasks.samples import find_task


def score_predictions(
    task: str, records: Sequence[Mapping[str, Any]], *, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Score answers, over all and length by length.

    Args:
        task: Name of the test.
        records: Each with `outputs`, `prediction` and, for scores by length, `max_length`.
        seed: Seed of the bootstrap, which scores between right and wrong take; the others take Wilson's interval.
        level: Confidence of the intervals, two-sided.

    Returns:
        `task`, `n`, `score`, `low` and `high` (per cent; the ends are None below two samples), `scores` (one a record,
        0 to 1) and `lengths`, a list of the same by `max_length`.

    Raises:
        ValueError: No such test, no records, or a record without a prediction or references.
    """
    found = find_task(task)
    if not records:
        raise ValueError("There are no predictions to score.")
    for number, record in enumerate(records, 1):
        missing = [key for key in ("prediction", "outputs") if not isinstance(record.get(key), str | list)]
        if missing or not record["outputs"]:
            raise ValueError(
                f"Record {number} has no {' and no '.join(missing) or 'references in outputs'}: "
                "each needs `prediction` (the model's answer) beside the sample's own `outputs`."
            )
    scores = [found.grade(record) for record in records]
    lengths = sorted({record["max_length"] for record in records if "max_length" in record})
    groups = [
        (length, [score for score, record in zip(scores, records, strict=True) if record.get("max_length") == length])
        for length in lengths
    ]
    return {
        "task": task,
        **_summary(scores, seed, level),
        "scores": scores,
        "lengths": [{"length": length, **_summary(group, seed, level)} for length, group in groups],
    }


def _summary(scores: Sequence[float], seed: int, level: float) -> dict[str, Any]:
    if set(scores) <= {0.0, 1.0}:
        # Right or wrong is a proportion: a bootstrap of 20 right answers out of 20 would claim certainty.
        low, high = wilson(int(sum(scores)), len(scores), level)
    else:
        low, high = bootstrap_mean(scores, seed=seed, level=level)
    ends = {"low": None, "high": None} if len(scores) < 2 else {"low": 100 * low, "high": 100 * high}
    return {"n": len(scores), "score": 100 * float(np.mean(scores)), **ends}
