"""The search: trials of a grid and of generations, kept one by one, then a few steps of training for the best.

The folder holds `search.yaml` (what was asked), `trials.jsonl` (one line a trial, appended as it ends), `finalists/`
and `results.json`. Every draw follows from the seed and the trials before, so a stopped search that is started again
does the rest of the same search.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.checkpoints.extend import extend
from ultralong.evaluation.measures.intervals import paired_difference
from ultralong.inference.load import load_model, load_model_and_tokenizer
from ultralong.rope import RopeScaling
from ultralong.search.score import Scorer
from ultralong.search.settings import SearchSettings
from ultralong.search.space import Genome, children, first_generation, grid, scaling_of, stretch
from ultralong.training.config import TrainConfig, preset
from ultralong.training.loop import train
from ultralong.utils import settings
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import append_jsonl, locked, make_folder, read_json, read_jsonl, write_json
from ultralong.utils.progress import progress
from ultralong.utils.units import many

OPTIONS = ("method", "factor", "attention_factor", "theta", "ramp", "alpha", "beta", "short_factors", "long_factors")


def search(
    wanted: SearchSettings,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    opened: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do what is missing of a search, and write its table.

    Args:
        wanted: What to try, and on what it is scored.
        out: Folder of the search.
        device: `auto`, or any of torch's.
        opened: The model and its tokenizer when they are open already.
        quiet: True draws no progress bars.

    Returns:
        The content of `results.json`: `trials`, best first, each with `method`, `options` (what `extend` takes),
        `scores` (nats), `each` (nats of every needle or text), `seconds` and `generation` (None for the grid); `alike`,
        as that function counts them; `unscaled` scores; `finalists`, each with `options`, `scores` before and
        `trained`; `best`, the options of the best; `settings` and `environment`.

    Raises:
        ValueError: The folder holds another search, or what `Scorer`, `grid` or the training refuse.
    """
    folder = make_folder(Path(out).expanduser())
    with locked(folder):
        asked = folder / "search.yaml"
        if asked.exists() and settings.load(SearchSettings, asked) != wanted:
            raise ValueError(f"{folder} holds another search (search.yaml). Give another --out, or remove the folder.")
        model, tokenizer = opened or load_model_and_tokenizer(wanted.model, device)
        scorer = Scorer(model, tokenizer, wanted, device)
        settings.save(wanted, asked, "Repeat or resume with: ultralong search")
        trials = Trials(scorer, folder / "trials.jsonl", quiet)
        trials.measure(grid(model.config, wanted), None)
        if "longrope" in wanted.methods:
            evolve(trials, model.config, wanted)
        ranked = trials.ranked(wanted.objective)
        finalists = [] if wanted.train is None else _finalists(ranked, wanted, folder, scorer, device)
        order = sorted(finalists, key=lambda found: found["trained"][wanted.objective]) or ranked
        result = {
            "alike": alike(ranked, wanted.objective),
            "settings": settings.to_mapping(wanted),
            "unscaled": trials.unscaled(),
            "trials": ranked,
            "finalists": finalists,
            "best": order[0]["options"],
            "environment": describe_environment(),
        }
        write_json(folder / "results.json", result)
        return result


class Trials:
    """Scores of scalings, each computed once and kept in a file.

    Args:
        scorer: Scores them.
        path: The file.
        quiet: True draws no progress bars.
    """

    def __init__(self, scorer: Scorer, path: Path, quiet: bool) -> None:
        self.scorer, self.path, self.quiet = scorer, path, quiet
        self.found = {record["key"]: record for record in (read_jsonl(path) if path.exists() else ())}
        self.asked: list[str] = []  # keys, in the order of the search

    def measure(self, scalings: Sequence[RopeScaling], generation: int | None) -> None:
        """Score what is not scored yet."""
        name = "grid" if generation is None else f"generation {generation}"
        for scaling in progress(scalings, desc=name, unit="trial", quiet=self.quiet):
            key = key_of(scaling)
            if key not in self.asked:
                self.asked.append(key)
            if key in self.found:
                continue
            started = time.perf_counter()
            parts = self.scorer.parts(scaling)
            self.found[key] = {
                "key": key,
                "method": scaling.method,
                "options": options_of(scaling),
                "scores": {name: self.scorer.mean(of) for name, of in parts.items()},
                "each": {name: [nats / max(tokens, 1) for nats, tokens in of] for name, of in parts.items()},
                "seconds": round(time.perf_counter() - started, 3),
                "generation": generation,
            }
            append_jsonl(self.path, self.found[key])

    def unscaled(self) -> dict[str, float]:
        """Scores of the model as it is."""
        if "unscaled" not in self.found:
            self.found["unscaled"] = {"key": "unscaled", "scores": self.scorer.score(None)}
            append_jsonl(self.path, self.found["unscaled"])
        return self.found["unscaled"]["scores"]

    def ranked(self, objective: str) -> list[dict[str, Any]]:
        """The trials of this search, best first."""
        return sorted((self.found[key] for key in self.asked), key=lambda trial: rank(trial["scores"], objective))


def alike(ranked: Sequence[Mapping[str, Any]], objective: str) -> dict[str, int] | None:
    """How many trials the best cannot be told from: the paired difference's 95% interval reaches zero.

    Returns:
        `trials`, without the best itself, and `samples`; None where a trial was scored before samples were kept.
    """
    if not all("each" in trial for trial in ranked):
        return None
    first = ranked[0]["each"][objective]
    low = [paired_difference(first, trial["each"][objective], seed=0).low for trial in ranked[1:]]
    return {"trials": sum(not end > 0 for end in low), "samples": len(first)}


def rank(scores: Mapping[str, float], objective: str) -> float:
    """A score to sort by: what is no number comes last."""
    value = scores[objective]
    return value if math.isfinite(value) else math.inf


def key_of(scaling: RopeScaling) -> str:
    """A scaling as one line of JSON."""
    return json.dumps(asdict(scaling), sort_keys=True)


def options_of(scaling: RopeScaling) -> dict[str, Any]:
    """What `extend` takes to write this scaling."""
    found = {name: getattr(scaling, name) for name in OPTIONS}
    if scaling.method in ("ntk", "linear", "longrope", "default"):
        found = {name: value for name, value in found.items() if name not in ("ramp", "alpha", "beta")}
    if scaling.method == "default":
        del found["factor"]
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value is not None
    }


def evolve(trials: Trials, config: Any, wanted: SearchSettings) -> None:
    """Generations of factor lists, each from the best of all before."""
    ratio = stretch(config, wanted.to)
    known: dict[str, Genome] = {}
    for generation in range(wanted.generations + 1):
        if generation == 0:
            born = first_generation(config, wanted)
        else:
            order = sorted(known, key=lambda key: rank(trials.found[key]["scores"], wanted.objective))
            born = children([known[key] for key in order[: wanted.parents]], generation, wanted, ratio)
        scalings = [scaling_of(genome, config, wanted.to) for genome in born]
        trials.measure(scalings, generation)
        for genome, scaling in zip(born, scalings, strict=True):
            known.setdefault(key_of(scaling), genome)


def _finalists(
    ranked: Sequence[dict[str, Any]], wanted: SearchSettings, out: Path, scorer: Scorer, device: str
) -> list[dict[str, Any]]:
    """The best scalings after a few steps of training, each the same."""
    found = []
    for number, trial in enumerate(chosen_finalists(ranked, wanted.finalists)):
        folder = out / "finalists" / f"{number}-{trial['method']}"
        record = folder / "scores.json"
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write(wanted, trial["options"], folder / "rescaled")
            base = settings.load(TrainConfig, preset(str(wanted.train)))
            config = replace(
                base,
                model=str(folder / "rescaled"),
                out=str(folder / "run"),
                steps=wanted.steps,
                length=None,
                save_every=0,
            )
            trained = train(config, quiet=True)
            scores = scorer.score(None, load_model(trained.model, device))
            write_json(record, {"options": trial["options"], "before": trial["scores"], "trained": scores})
        found.append(read_json(record))
    return found


def chosen_finalists(ranked: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The best, but no more of one method than an even share and one more, as near neighbours tell little apart."""
    methods = {trial["method"] for trial in ranked}
    most, taken = -(-count // len(methods)) + 1, list[dict[str, Any]]()
    for trial in ranked:
        if len(taken) < count and sum(other["method"] == trial["method"] for other in taken) < most:
            taken.append(trial)
    return taken


def write(wanted: SearchSettings, options: Mapping[str, Any], out: str | os.PathLike[str]) -> None:
    """Write the model with a scaling that was found."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    extend(wanted.model, wanted.to, out, given.pop("method"), quiet=True, **given)


def table_lines(result: Mapping[str, Any], most: int = 12) -> list[str]:
    """What a search found, for a terminal.

    Args:
        result: As `search` returns it.
        most: Trials to list.
    """
    names = list(result["trials"][0]["scores"])
    head = "".join(f"{name:>12}" for name in names)
    lines = [f"{'mean loss, nats':26}{head}   of {len(result['trials'])} trials, best first"]
    lines.append(f"{'unscaled':26}" + _scores(result["unscaled"], names))
    lines += [f"{_label(trial['options']):26}" + _scores(trial["scores"], names) for trial in result["trials"][:most]]
    if result["alike"] is not None:
        found, others = result["alike"], len(result["trials"]) - 1
        samples = many(found["samples"], "sample")
        if found["trials"]:
            lines.append(
                f"{found['trials']} of the other {others} cannot be told from the first by {samples}: the interval of "
                "the paired difference reaches zero. More --samples tell more, and --train what training leaves."
            )
        else:
            lines.append(f"The first is told from each of the other {others} by {samples}, untrained.")
    if result["finalists"]:
        steps = result["settings"]["steps"]
        lines.append(f"after {steps} steps of training")
        lines += [f"{_label(found['options']):26}" + _scores(found["trained"], names) for found in result["finalists"]]
    return lines


def _scores(scores: Mapping[str, float], names: Sequence[str]) -> str:
    return "".join(f"{scores[name]:12.4g}" for name in names)


def _label(options: Mapping[str, Any]) -> str:
    """Method and settings in a few words."""
    said = [options["method"]]
    if "factor" in options and options["method"] != "longrope":
        said.append(f"x{options['factor']:g}")
    if "beta" in options:
        said.append(f"beta {options['beta']:g}")
    if options["method"] == "default":
        said.append(f"base {options['theta']:g}")
    if options.get("attention_factor") == 1.0:
        said.append("no temperature")
    return " ".join(said)
