"""The table of a study: each arm before, rescaled and trained, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ultralong.ablation.outcomes import Outcome
from ultralong.ablation.study import BASE_ARM, Study, changes_text
from ultralong.evaluation.measures.intervals import Difference, alike_difference, crossed_difference

Measured = Mapping[str, Mapping[int, Sequence[Outcome]]]  # by arm and seed
DRAWS_SEED = 0


def summarise(
    study: Study, before: Sequence[Outcome], rescaled: Mapping[str, Sequence[Outcome]], trained: Measured
) -> dict[str, Any]:
    """Everything that can be said of what is measured so far.

    Args:
        study: The study.
        before: Outcomes of the model before.
        rescaled: Of each arm's rescaled model.
        trained: Of each arm and seed.

    Returns:
        `outcomes`, one a measure: `name`, `unit`, `n`, `headline`, `arms`, one an arm with `before`, `rescaled`,
        `trained` and the differences `to_base` (trained, against the base's of the same seeds), `by_training` (trained
        less rescaled) and `by_rescaling` (rescaled less before), each with `mean`, `low`, `high`, `seeds` and `n`, or
        None; `verdicts`, one an arm with `hypothesis`, `refuted_if`, `verdict` and the difference.

    Raises:
        ValueError: Samples differ between two arms, or a refutation names an outcome that there is not.
    """
    outcomes = []
    for outcome in before:
        arms = [
            {
                "arm": arm,
                **_row(
                    outcome,
                    _named(rescaled.get(arm), outcome),
                    {seed: _named(found, outcome) for seed, found in trained.get(arm, {}).items()},
                    {seed: _named(found, outcome) for seed, found in trained.get(BASE_ARM, {}).items()},
                    arm,
                ),
            }
            for arm in study.designs()
        ]
        outcomes.append(
            {
                "name": outcome.name,
                "unit": "per cent" if outcome.unit == "per cent" else "perplexity",
                "n": len(outcome.values),
                "headline": outcome.headline,
                "arms": arms,
            }
        )
    return {"outcomes": outcomes, "verdicts": [_verdict(arm, outcomes) for arm in study.arms]}


def _named(found: Sequence[Outcome] | None, wanted: Outcome) -> Outcome | None:
    """The outcome of that name, checked to be of the same samples."""
    if found is None:
        return None
    same = next((outcome for outcome in found if outcome.name == wanted.name), None)
    if same is None or same.samples != wanted.samples:
        raise ValueError(f"{wanted.name}: two models of this study were measured on other samples.")
    return same


def _row(
    before: Outcome,
    rescaled: Outcome | None,
    trained: Mapping[int, Outcome | None],
    base: Mapping[int, Outcome | None],
    arm: str,
) -> dict[str, Any]:
    ours = {seed: np.asarray(outcome.values) for seed, outcome in trained.items() if outcome is not None}
    theirs = {seed: np.asarray(outcome.values) for seed, outcome in base.items() if outcome is not None}
    start = np.asarray(before.values)
    middle = None if rescaled is None else np.asarray(rescaled.values)
    both = sorted(ours.keys() & theirs.keys()) if arm != BASE_ARM else []
    seeds = sorted(ours)
    return {
        "before": _level(start, before.unit),
        "rescaled": None if middle is None else _level(middle, before.unit),
        "trained": _level(np.stack([ours[s] for s in seeds]), before.unit) if seeds else None,
        "by_rescaling": None if middle is None else _difference([middle - start], before.unit),
        "by_training": None if middle is None else _difference([ours[s] - middle for s in seeds], before.unit),
        "to_base": _difference([ours[s] - theirs[s] for s in both], before.unit),
    }


def _level(values: np.ndarray, unit: str) -> float:
    """The mean score, or the perplexity."""
    return float(values.mean()) if unit == "per cent" else math.exp(float(values.mean()))


def _difference(rows: Sequence[np.ndarray], unit: str) -> dict[str, Any] | None:
    """A paired difference: per cent points of a score, per cent of a perplexity."""
    if not rows:
        return None
    each = np.stack(rows)
    found = crossed_difference(each, seed=DRAWS_SEED)
    if unit == "per cent":  # few seeds widen an interval, beyond what a score can differ by too
        ends = [found.low, found.high]
        if found.n > 1 and each.min() == each.max():  # seeds share their samples: more seeds are no more pairs
            ends = [100 * end for end in alike_difference(found.mean / 100, found.n)]
        low, high = (float(np.clip(end, -100, 100)) for end in ends)
        values = Difference(found.mean, low, high, found.n)
    else:
        values = Difference(_per_cent(found.mean), _per_cent(found.low), _per_cent(found.high), found.n)
    return {
        "mean": values.mean,
        "low": _number(values.low),
        "high": _number(values.high),
        "seeds": len(rows),
        "n": values.n,
    }


def _per_cent(nats: float) -> float:
    """The change of a perplexity in per cent, from the change of the mean loss in nats."""
    return 100 * math.expm1(nats)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _verdict(arm: Any, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [outcome["name"] for outcome in outcomes]
    if arm.refuted_if.outcome not in names:
        raise ValueError(
            f"arm {arm.name}: refuted_if names {arm.refuted_if.outcome!r}, which is not measured; there are "
            f"{', '.join(names)}."
        )
    outcome = outcomes[names.index(arm.refuted_if.outcome)]
    difference = next(row["to_base"] for row in outcome["arms"] if row["arm"] == arm.name)
    ends = (None, None) if difference is None else (difference["low"], difference["high"])
    return {
        "arm": arm.name,
        "changes": changes_text(arm),
        "hypothesis": arm.hypothesis,
        "refuted_if": str(arm.refuted_if),
        "difference": difference,
        "verdict": "not measured yet" if difference is None else arm.refuted_if.verdict(*ends),
    }
