"""What an arm comes to: its training configs, rows and evaluation, and the keys under which they are shared.

A key is a hash of everything that decides the bytes of an artefact. Arms that agree up to a point have the same keys up
to it, so what they share is built once, and nothing is taken for something that it is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ultralong.ablation.design import Design, Rows, Scaling, Stage
from ultralong.ablation.outcomes import BEYOND, LONGPPL, NEEDLES, PERPLEXITY, TESTS
from ultralong.ablation.study import BASE_ARM, Study, flat
from ultralong.checkpoints.config import load_config
from ultralong.checkpoints.files import locate, weight_files
from ultralong.checkpoints.rescale import Extension, choose_scaling
from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.groups import SPECIAL, expand
from ultralong.training.config import DataSource, TrainConfig, preset
from ultralong.utils import settings
from ultralong.utils.files import sha256

# Keys that the study itself gives.
OWN_OF_TRAINING = ("model", "out", "data", "seed", "length", "base_model")
OWN_OF_EVALUATION = ("model", "haystack", "rows")
KEY_LENGTH = 16  # hexadecimal digits: 64 bits


@dataclass(frozen=True)
class Link:
    """One stage of one arm and seed, by the keys of its parts.

    Attributes:
        stage: The window.
        extended: Key of the rescaled checkpoint.
        rows: Key of the packed rows.
        trained: Key of the run.
    """

    stage: Stage
    extended: str
    rows: str
    trained: str


def key(kind: str, *parts: Any) -> str:
    """The name of an artefact: a hash of what decides its bytes."""
    text = json.dumps([kind, *parts], sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]}"


def told(value: Any) -> Any:
    """The settings that are not at their defaults, so that a setting which a later version adds changes no key."""
    if isinstance(value, list | tuple):
        return [told(item) for item in value]
    if not is_dataclass(value):
        return value
    plain = settings.to_mapping(value)
    found = {}
    for field in fields(value):
        given = getattr(value, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is MISSING or given != default:
            nested = is_dataclass(given) or isinstance(given, list | tuple)
            found[field.name] = told(given) if nested else plain[field.name]
    return found


def base_folder(design: Design) -> Path:
    """Folder of the model before."""
    return locate(design.model)


def model_key(folder: Path) -> str:
    """Key of a checkpoint: its config, tokenizer and weights."""
    names = ["config.json", *weight_files(folder)]
    names += [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    return key("model", [[name, sha256(folder / name)] for name in names])


def recipe_of(rows: Rows) -> Recipe:
    """The data recipe with a study's changes.

    Raises:
        ValueError: There is no such recipe, or a change does not fit it.
    """
    changes = {**rows.changes, **{f"packing.{name}": value for name, value in rows.packing.items()}}
    recipe = load_recipe(rows.recipe)
    if rows.max_characters is not None:
        sources = tuple(replace(source, max_characters=rows.max_characters) for source in recipe.sources)
        recipe = replace(recipe, sources=sources)
    texts = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    where = f"recipe {rows.recipe}"
    return settings.from_mapping(Recipe, settings.override(settings.to_mapping(recipe), texts, Recipe), where)


def training_config(design: Design, stage: Stage, seed: int, model: Path, rows: Path, out: Path) -> TrainConfig:
    """The run of a stage.

    Raises:
        ValueError: A key of `training` is unknown, of the wrong type, or the study's own.
    """
    given = dict(design.training)
    _refuse("training", given, OWN_OF_TRAINING)
    name = given.pop("preset", None)
    values: Mapping[str, Any] = {} if name is None else settings.to_mapping(settings.load(TrainConfig, preset(name)))
    changes = [f"{path}={json.dumps(value)}" for path, value in flat(given).items()]
    merged = settings.override(values, changes, TrainConfig)
    own = {
        "model": str(model),
        "out": str(out),
        "data": [settings.to_mapping(DataSource(str(rows)))],
        "seed": seed,
        "length": stage.length,
        "base_model": None,
    }
    steps = {} if stage.steps is None else {"steps": stage.steps}
    return settings.from_mapping(TrainConfig, {**merged, **own, **steps}, "training")


def run_settings(design: Design, model: str, haystack: str | None, rows: str | None) -> RunSettings:
    """The evaluation of a model, at every length, beyond its window too.

    Raises:
        ValueError: A key of `evaluation` is unknown, of the wrong type, or the study's own.
    """
    _refuse("evaluation", design.evaluation, OWN_OF_EVALUATION)
    own = {"model": model, "haystack": haystack, "rows": rows, "beyond_window": True}
    wanted = settings.from_mapping(RunSettings, {**design.evaluation, **own}, "evaluation")
    return replace(wanted, tasks=tuple(expand(wanted.tasks)))


def extension_key(before: str, stage: Stage, scaling: Scaling) -> str:
    """Key of a checkpoint that is rescaled to a stage's window."""
    return key("extended", before, stage.to, stage.factor, told(scaling))


def rows_key(rows: Rows, length: int, tokenizer: str) -> str:
    """Key of packed rows."""
    return key("rows", told(recipe_of(rows)), rows.limit, length, tokenizer)


def links(design: Design, seed: int, base: str) -> list[Link]:
    """The stages of an arm and seed, by their keys.

    Args:
        design: The arm.
        seed: Training seed.
        base: Key of the model before.
    """
    found, before = [], base
    for stage in design.stages:
        extended = extension_key(before, stage, design.scaling)
        rows = rows_key(design.rows, stage.length, base)
        config = training_config(design, stage, seed, Path("model"), Path("rows"), Path("out"))
        before = key("trained", extended, rows, told(config), design.processes)
        found.append(Link(stage, extended, rows, before))
    return found


def final_key(design: Design, seed: int, base: str) -> str:
    """Key of the model that is measured: the trained one, or its average with the rescaled, untrained one."""
    trained = links(design, seed, base)[-1].trained
    if not design.start_share:
        return trained
    return key("merged", trained, extension_key(base, design.stages[-1], design.scaling), design.start_share)


def heldout_key(design: Design, base: str) -> str:
    """Key of the held-out texts and rows."""
    return rows_key(design.heldout, design.window, base).replace("rows-", "heldout-")


def measured_key(design: Design, model: str, base: str) -> str:
    """Key of the evaluation of a model."""
    wanted = told(run_settings(design, "model", "texts", "rows"))
    return key("measured", model, wanted, heldout_key(design, base))


def check(study: Study) -> str:
    """Check all that can be checked before work starts.

    Returns:
        Key of the model before.

    Raises:
        ValueError: An arm's settings are wrong, do what the base or another arm does, or name an outcome wrongly.
    """
    _check_outcomes(study)
    base = base_folder(study.base)
    name, config = model_key(base), load_config(base)
    done: dict[str, str] = {}
    for arm, design in study.designs().items():
        try:
            final = final_key(design, study.seeds[0], name)
            run_settings(design, "model", "texts", "rows")
            for stage in design.stages:
                _check_rows(design, stage, study.seeds[0])
            recipe_of(design.heldout).row_settings(design.window)
            for stage in design.stages:
                choose_scaling(config, extension(stage, design.scaling))
        except ValueError as error:
            raise ValueError(f"arm {arm}: {error}") from error
        if final in done:
            same = "changes nothing: it does what the base does" if done[final] == BASE_ARM else ""
            raise ValueError(f"arm {arm} {same or f'does what arm {done[final]} does'}. Remove it, or change it.")
        done[final] = arm
    return name


def _check_rows(design: Design, stage: Stage, seed: int) -> None:
    rows = recipe_of(design.rows).row_settings(stage.length)
    config = training_config(design, stage, seed, Path("model"), Path("rows"), Path("out"))
    if config.skip_positions_to is not None and getattr(rows, "mask_documents", False):
        raise ValueError("training.skip_positions_to cuts whole rows in two, and rows.packing masks documents.")
    if config.anchor and not getattr(rows, "mask_documents", False):
        raise ValueError("training.anchor needs masked documents: set rows.packing.mask_documents: true.")
    if config.long_ce.weight_cap and stage.length < config.long_ce.shortest:
        raise ValueError(
            f"training.long_ce weighs what stands in {config.long_ce.shortest:,} tokens (short_context and stride) or "
            f"more, and rows have {stage.length:,}: set training.long_ce.short_context and stride lower."
        )


def extension(stage: Stage, scaling: Scaling) -> Extension:
    """What is asked of `choose_scaling` for a stage."""
    return Extension(to=stage.to, factor=stage.factor, **asdict(scaling))


def _check_outcomes(study: Study) -> None:
    """Refuse a refutation by something that the evaluation does not measure."""
    wanted = run_settings(study.base, "model", "texts", "rows")
    tests = wanted.tasks
    if "longppl" in tests and wanted.evaluator is None:
        raise ValueError(
            "evaluation.tasks has longppl: name evaluation.evaluator, the one model that chooses the key tokens of all "
            "arms (one that reads this far)."
        )
    answered = [name for name in tests if name not in SPECIAL]
    joined = [
        *([NEEDLES] if "needle" in tests else []),
        *([PERPLEXITY] if "perplexity" in tests else []),
        *([TESTS] if answered else []),
    ]
    names = [*joined, *(name + BEYOND for name in joined), *([LONGPPL] if "longppl" in tests else [])]
    single = tuple(f"{name} at " for name in tests)
    for arm in study.arms:
        outcome = arm.refuted_if.outcome
        if outcome not in names and not outcome.startswith(single):
            raise ValueError(
                f"arm {arm.name}: refuted_if names {outcome!r}, which is not measured; there are {', '.join(names)}, "
                "and a test at a length, such as 'niah_single_1 at 4,096'."
            )


def _refuse(where: str, given: Mapping[str, Any], own: tuple[str, ...]) -> None:
    clash = [name for name in given if name in own]
    if clash:
        raise ValueError(f"{where}: {', '.join(clash)} does not belong here: the study gives it.")
