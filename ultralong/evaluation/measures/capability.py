"""Scores by capability and length, and the area under each curve.

One number over all lengths hides where a model stops reading, and one over all tests hides what it cannot do: ATLAS
(2026) and RULER (Hsieh et al. 2024) report by what a test asks for. Only tests that are made at every length enter;
published texts have the length that they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ultralong.evaluation.measures.result import Part, Result
from ultralong.evaluation.tasks.samples import GENERATED, find_task
from ultralong.evaluation.tasks.task import CAPABILITIES


def mean_of_tasks(group: Sequence[Part], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Weighted mean of values measured apart, with an interval from theirs.

    The distances from estimate to end add up as squares (Zou and Donner 2008's method of variance estimates recovery),
    which keeps ends inside 0 to 100 and says something even where every answer was right.

    Args:
        group: The values in per cent, each with its interval.
        weights: How much each counts, in all 1; None takes them equally.

    Returns:
        `score`, `low`, `high`; the ends are None where a value has none.
    """
    shares = [1 / len(group)] * len(group) if weights is None else weights
    mean = math.fsum(share * part.value for share, part in zip(shares, group, strict=True))
    down = up = 0.0
    for share, part in zip(shares, group, strict=True):
        if part.low is None or part.high is None:
            return {"score": mean, "low": None, "high": None}
        down += (share * (part.value - part.low)) ** 2
        up += (share * (part.value - part.high)) ** 2
    return {"score": mean, "low": max(0.0, mean - math.sqrt(down)), "high": min(100.0, mean + math.sqrt(up))}


def capability_means(scores: Iterable[Result]) -> list[dict[str, Any]]:
    """Unweighted mean over the tests of each capability at each length.

    Args:
        scores: Scores of tests, as `score_predictions` gives them.

    Returns:
        One dictionary a capability and length, in the order of `CAPABILITIES`: `capability`, `length` (tokens), `tasks`
        (over how many), `n` (samples), `score`, `low`, `high` (per cent).
    """
    groups: dict[tuple[str, int], list[Part]] = {}
    for result in scores:
        if result.task in GENERATED:
            for part in result.by_length:
                groups.setdefault((find_task(result.task).capability, part.length or 0), []).append(part)
    return [
        {"capability": name, "length": length, "tasks": len(group), "n": sum(part.n for part in group)}
        | mean_of_tasks(group)
        for name, length in sorted(groups, key=lambda key: (CAPABILITIES.index(key[0]), key[1]))
        for group in (groups[name, length],)
    ]


def trapezoid_weights(lengths: Sequence[int]) -> list[float]:
    """Weight of each length in the area under a curve over the logarithm of length, divided by the curve's width.

    Doubling the length counts the same anywhere, so that the longest prompts do not stand for all. A curve at 100
    everywhere has an area of 100.

    Args:
        lengths: At least two, rising.
    """
    places = np.log2(np.asarray(lengths, float))
    widths = np.diff(places) / (places[-1] - places[0])
    return [float(weight) for weight in (np.append(0.0, widths) + np.append(widths, 0.0)) / 2]


def curve_areas(means: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Area under the curve of each capability, over the lengths at which all of its tests were measured.

    Args:
        means: As `capability_means` gives them.

    Returns:
        One dictionary a capability that has two such lengths or more: `capability`, `tasks`, `first` and `last` (the
        lengths between which it runs), `score` (the area, 0 to 100), `low`, `high`.
    """
    areas = []
    for name in dict.fromkeys(item["capability"] for item in means):
        curve = [item for item in means if item["capability"] == name]
        most = max(item["tasks"] for item in curve)
        whole = [item for item in curve if item["tasks"] == most]
        if len(whole) < 2:
            continue
        lengths = [item["length"] for item in whole]
        parts = [Part(item["score"], item["n"], item["low"], item["high"]) for item in whole]
        areas.append(
            {"capability": name, "tasks": most, "first": lengths[0], "last": lengths[-1]}
            | mean_of_tasks(parts, trapezoid_weights(lengths))
        )
    return areas
