"""A study from its file to its page: what is missing is built arm by arm, and the table is written after each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ultralong.ablation.build import PATIENCE, Builder
from ultralong.ablation.design import Design
from ultralong.ablation.outcomes import Outcome
from ultralong.ablation.page import PAGE, draw_study
from ultralong.ablation.resolve import check
from ultralong.ablation.results import summarise
from ultralong.ablation.study import BASE_ARM, Study, flat
from ultralong.ablation.texts import TEXTS, keep_texts
from ultralong.utils import settings
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import make_folder, write_json
from ultralong.utils.progress import hidden_bars
from ultralong.utils.text_formats import read_yaml


def ablate(
    study: Study,
    out: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    device: str = "auto",
    draw: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is missing of a study, and write its table and page.

    Every seed goes through all arms before the next one starts, so that a study that is cut short has whole
    comparisons. What arms share is built once; a stopped call is resumed, within a training run or an evaluation too.
    Several calls may work in one folder at once, such as one on each GPU: each takes an arm and seed that no other is
    at, and all end with the whole table.

    Args:
        study: What to compare.
        out: Folder of the study; it may hold what an earlier call with other arms or seeds left.
        only: Names of arms to run now, beside the base; all when empty.
        device: Where evaluation runs: `auto`, or any of torch's.
        draw: False writes no page.
        quiet: No progress bars.

    Returns:
        The content of `results.json`: as `results.summarise`, with `name`, `question`, `seeds`, `base`, `runs` (what
        each training took, None where its folder was deleted), `missing` (arms and seeds not done yet) and
        `environment`.

    Raises:
        ValueError: The study is wrong; nothing was started then.
    """
    base = check(study)
    designs = study.designs()
    unknown = [name for name in only if name not in designs]
    if unknown:
        raise ValueError(f"There is no arm {', '.join(unknown)}; there are {', '.join(designs)}.")
    wanted = {name: design for name, design in designs.items() if not only or name in (BASE_ARM, *only)}
    builder = Builder(make_folder(Path(out).expanduser()), base, device, quiet)
    for folder in ("shared", "runs"):
        make_folder(builder.out / folder)
    with builder.writing(TEXTS) as file:
        keep_texts(study, file)
    with builder.writing("study.yaml") as file:
        for line in changed_since(file, study):
            _say(f"note: {line}", quiet)
        settings.save(study, file, "Repeat or resume with: ultralong ablate study.yaml --out")
    state = State(study, builder)
    result = state.write() if state.refresh() else {}
    if state.runs:
        _say(f"{len(state.runs)} of {len(state.records)} runs (arm and seed) are measured already", quiet)
    for patience in (0.0, PATIENCE):  # what no other call is at; then what another is at, or has left undone
        for arm, seed, design in _order(wanted, study.seeds):
            if state.has(arm, seed):
                continue
            with ExitStack() as held:
                held.enter_context(hidden_bars(quiet))
                try:
                    held.enter_context(builder.alone(f"{arm}-seed-{seed}", patience))
                except ValueError:
                    continue
                state.refresh()
                if not state.has(arm, seed):
                    _say(f"arm {arm}, seed {seed}: run {len(state.runs) + 1} of {len(state.records)}", quiet)
                    state.measure(arm, seed, design)
            result = state.write()
    if draw:
        with builder.writing(PAGE):
            draw_study(result, builder.out)
    return result


def changed_since(file: Path, study: Study) -> list[str]:
    """What a study changes of the one that its folder was last used with, and what that means: a sentence each."""
    if not file.exists():
        return []
    old = read_yaml(file.read_text(encoding="utf-8"), settings=True)
    before, now = flat(old.get("base", {})), flat(settings.to_mapping(study.base))
    said = [
        f"base.{name} was {json.dumps(before[name])} when this folder was last used, and is {json.dumps(value)} now."
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if said:
        said.append(
            "What that decides is made anew in all arms, and what it does not is kept. The results of before are no "
            "longer in results.json: the file of before brings them back without training."
        )
    return said


def _order(designs: Mapping[str, Design], seeds: Sequence[int]) -> Iterator[tuple[str, int, Design]]:
    for seed in seeds:
        for arm, design in designs.items():
            yield arm, seed, design


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


class State:
    """What is measured so far of a study, found again in its folder.

    Args:
        study: The study.
        builder: Builds what is missing.
    """

    def __init__(self, study: Study, builder: Builder) -> None:
        self.study, self.builder = study, builder
        self.before: list[Outcome] = []
        self.rescaled: dict[str, list[Outcome]] = {}
        self.trained: dict[str, dict[int, list[Outcome]]] = {}
        self.runs: list[dict[str, Any]] = []
        self.records = {
            (arm, seed): (design, builder.records(design, seed))
            for arm, seed, design in _order(study.designs(), study.seeds)
        }

    def has(self, arm: str, seed: int) -> bool:
        """Whether an arm and seed is in the table."""
        return seed in self.trained.get(arm, {})

    def refresh(self) -> bool:
        """Take in what is measured in the folder, by this call, an earlier one or another; False where nothing is."""
        for (arm, seed), (design, files) in self.records.items():
            if not self.has(arm, seed) and all(file.exists() for file in files):
                self.measure(arm, seed, design)
        return bool(self.runs)

    def measure(self, arm: str, seed: int, design: Design) -> None:
        """Train and measure an arm with a seed, and what it is compared with."""
        self.before = self.builder.before(design)
        if arm not in self.rescaled:
            self.rescaled[arm] = self.builder.rescaled(design)
        self.trained.setdefault(arm, {})[seed] = self.builder.trained(design, seed)
        self.runs.append({"arm": arm, "seed": seed, **self.builder.cost(design, seed)})

    def write(self) -> dict[str, Any]:
        """Write `results.json`."""
        asked = [(arm, seed) for seed in self.study.seeds for arm in self.study.designs()]
        done = [(run["arm"], run["seed"]) for run in self.runs]
        self.runs.sort(key=lambda run: asked.index((run["arm"], run["seed"])))
        found = {
            "name": self.study.name,
            "question": self.study.question,
            "seeds": list(self.study.seeds),
            "base": settings.to_mapping(self.study.base),
            **summarise(self.study, self.before, self.rescaled, self.trained),
            "runs": self.runs,
            "missing": [{"arm": arm, "seed": seed} for arm, seed in asked if (arm, seed) not in done],
            "environment": describe_environment(),
        }
        with self.builder.writing("results.json") as file:
            write_json(file, found)
        return found
