"""A study as one YAML file: a base that says everything, and arms that change named keys of it.

The dataclasses below and in `design` are the schema; `studies/` beside this module holds the files that ship. A key
that is misspelt or of the wrong type is an error that names it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.ablation.design import Design
from ultralong.utils import settings

STUDIES = Path(__file__).parent / "studies"
BASE_ARM = "base"
SAME_IN_ALL = ("model", "heldout", "evaluation")  # of a design: what makes the samples the same
ARM_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Refutation:
    """The number that refutes an arm's hypothesis, written down before the run. Exactly one side is given.

    Attributes:
        outcome: Name of an outcome of the study's table.
        below: A difference (this arm minus the base) below this refutes it: per cent points for scores, per cent for
            perplexity.
        above: A difference above this refutes it.
    """

    outcome: str
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        given = [side for side in (self.below, self.above) if side is not None]
        if len(given) != 1 or not math.isfinite(given[0]):
            raise ValueError(f"refuted_if needs a finite number as either below or above, found {given}.")

    def verdict(self, low: float | None, high: float | None) -> str:
        """Return refuted, not refuted or undecided, by the side of the number that the whole interval lies on."""
        if low is None or high is None:
            return "undecided"
        if self.below is not None:
            return "refuted" if high < self.below else "not refuted" if low >= self.below else "undecided"
        assert self.above is not None
        return "refuted" if low > self.above else "not refuted" if high <= self.above else "undecided"

    def __str__(self) -> str:
        side, number = ("below", self.below) if self.below is not None else ("above", self.above)
        return f"{self.outcome}: difference {side} {number:+g}"


@dataclass(frozen=True)
class Arm:
    """One way to do it otherwise.

    Attributes:
        name: Short name.
        changes: New values by key of the base, with dots for groups.
        hypothesis: What is expected of it, in a sentence.
        refuted_if: What would refute that.
    """

    name: str
    changes: dict[str, Any]
    hypothesis: str
    refuted_if: Refutation

    def __post_init__(self) -> None:
        if not ARM_NAME.fullmatch(self.name) or self.name == BASE_ARM:
            raise ValueError(
                f"an arm's name has letters, digits and . _ + - only and is not {BASE_ARM!r}, found {self.name!r}."
            )
        if not self.hypothesis.strip():
            raise ValueError(f"arm {self.name}: hypothesis must say what is expected.")


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        name: Short name.
        question: What is asked, in a sentence.
        base: What every arm shares but for its changes.
        arms: The other ways.
        seeds: Training seeds; every arm is trained with each of them.
    """

    name: str
    question: str
    base: Design
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms: one or more with different names are needed, found {names}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: one or more different numbers are needed, found {list(self.seeds)}.")
        self.designs()

    def designs(self) -> dict[str, Design]:
        """Every arm's design by its name, the base first.

        Raises:
            ValueError: An arm changes a key that there is not, nothing, or what has to be the same in all arms.
        """
        found = {BASE_ARM: self.base}
        for arm in self.arms:
            found[arm.name] = changed(self.base, arm)
        return found


def changed(base: Design, arm: Arm) -> Design:
    """The base with an arm's changes.

    Raises:
        ValueError: See `Study.designs`.
    """
    where = f"arm {arm.name}"
    if not arm.changes:
        raise ValueError(f"{where} changes nothing.")
    texts = [f"{key}={json.dumps(value)}" for key, value in flat(arm.changes).items()]
    design = settings.from_mapping(Design, settings.override(settings.to_mapping(base), texts, Design), where)
    for name in SAME_IN_ALL:
        if getattr(design, name) != getattr(base, name):
            raise ValueError(f"{where} changes {name}, which has to be the same in all arms: samples are paired.")
    if design.window != base.window:
        raise ValueError(f"{where} ends at a window of {design.window:,} tokens, the base at {base.window:,}.")
    if design == base:
        raise ValueError(f"{where} changes nothing: {_listed(flat(arm.changes))} is what the base has.")
    return design


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings as one level of keys with dots; an empty group stays as it is."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in changes.items())


def changes_text(arm: Arm) -> str:
    """An arm's changes on one line."""
    return _listed(flat(arm.changes))


def find_study(name: str | os.PathLike[str]) -> Path:
    """The file of a study: `name` itself if it is one, else one that ships, by its name.

    Raises:
        ValueError: There is neither; the message lists what there is.
    """
    if (path := Path(name).expanduser()).is_file():
        return path
    if (shipped := STUDIES / f"{name}.yaml").is_file():
        return shipped
    known = sorted(file.stem for file in STUDIES.glob("*.yaml"))
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"{str(name)!r} is neither a study's file nor one that ships. {hint}Studies: "
        f"{', '.join(known)}. Their files, to copy for one of your own, are in {STUDIES}."
    )


def load_study(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """Read a study; a path in it is meant from the folder that the command is run in.

    Args:
        name: Name of a study that ships, or a YAML file.
        overrides: `"key=value"` strings, such as `"seeds=[0]"` or `"base.training.steps=10"`.

    Raises:
        ValueError: There is none, or it is wrong; the message names file and key.
    """
    return settings.load(Study, find_study(name), overrides)
