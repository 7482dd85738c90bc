"""The configs of an arm's training runs and of its evaluation, from the keys that a study gives."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from ultralong.ablation.design import Design, Sft, Stage
from ultralong.ablation.study import flat
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.groups import expand
from ultralong.evaluation.tasks.task import DATA_OPTIONS
from ultralong.training.config import DataSource, TrainConfig, preset
from ultralong.utils import settings

# Keys that the study itself gives.
OWN_OF_TRAINING = ("model", "out", "data", "seed", "length", "base_model")
EVALUATION = "base.evaluation"  # the same in all arms: what makes the samples the same
OWN_OF_EVALUATION = ("model", "haystack", "rows")
SFT_DEFAULTS = {"optimizer": {"lr": 5e-6}}  # the paper's rate for SFT; a training config's own is that of pretraining


def training_config(design: Design, stage: Stage, seed: int, model: Path, rows: Path, out: Path) -> TrainConfig:
    """The run of a stage that has steps.

    Raises:
        ValueError: A key of `training` is unknown, of the wrong type, or the study's own.
    """
    values = _given("training", design.training, stage.steps)
    if stage.training:
        where = "stages.training"
        _refuse(where, stage.training, ("preset", "steps"))  # the steps stand beside it
        values = _changed(where, values, stage.training)
    return _config("training", values, seed, stage.length, model, rows, out)


def sft_config(sft: Sft, seed: int, model: Path, rows: Path, out: Path) -> TrainConfig:
    """The run of SFT.

    Raises:
        ValueError: As in `training_config`, of `sft.training`.
    """
    values = _given("sft.training", sft.training, None, SFT_DEFAULTS)
    return _config("sft.training", values, seed, sft.length, model, rows, out)


def _given(
    where: str, given: Mapping[str, Any], steps: int | None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The keys of a training config that a study gives: its preset's, or the defaults, with its changes."""
    given = dict(given)
    name = given.pop("preset", None)
    values: Mapping[str, Any] = (
        defaults or {} if name is None else settings.to_mapping(settings.load(TrainConfig, preset(name)))
    )
    found = _changed(where, values, given)
    return found if steps is None else {**found, "steps": steps}


def _changed(where: str, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(where, changes, OWN_OF_TRAINING)
    return settings.override(
        values, [f"{key}={json.dumps(value)}" for key, value in flat(changes).items()], TrainConfig
    )


def _config(
    where: str, values: Mapping[str, Any], seed: int, length: int, model: Path, rows: Path, out: Path
) -> TrainConfig:
    own = {
        "model": str(model),
        "out": str(out),
        "data": [settings.to_mapping(DataSource(str(rows)))],
        "seed": seed,
        "length": length,
        "base_model": None,
    }
    return settings.from_mapping(TrainConfig, {**values, **own}, where)


def has_steps(design: Design, stage: Stage) -> bool:
    """Whether a stage trains: 0 steps rescale alone."""
    steps = _given("training", design.training, stage.steps).get("steps")
    return isinstance(steps, bool) or steps != 0  # a training config refuses whatever else is no number of steps


def run_settings(design: Design, model: str, haystack: str | None, rows: str | None) -> RunSettings:
    """The evaluation of a model, at every length, beyond its window too.

    Raises:
        ValueError: A key of `evaluation` is unknown, of the wrong type, or the study's own.
    """
    _refuse(EVALUATION, design.evaluation, OWN_OF_EVALUATION)
    own = {"model": model, "haystack": haystack, "rows": rows, "beyond_window": True}
    with evaluation_keys():
        wanted = settings.from_mapping(RunSettings, {**design.evaluation, **own}, EVALUATION)
    return replace(wanted, tasks=tuple(expand(wanted.tasks)))


@contextmanager
def evaluation_keys() -> Iterator[None]:
    """Let errors and warnings of the evaluation name a study's keys where they name options of other commands."""
    keys = {field.name: field.name for field in fields(RunSettings)} | {"kv": "kv_dtype"}

    def key(option: re.Match[str]) -> str:
        name = keys.get(option[1].replace("-", "_"))
        return option[0] if name is None else f"{EVALUATION}.{name}{'=' if option[2] else ''}"

    def said(text: str) -> str:
        return re.sub(r"(?<![\w-])--([a-z][a-z-]*)( (?=\d))?", key, text.replace(DATA_OPTIONS, f"{EVALUATION}.data"))

    with warnings.catch_warnings():
        show = warnings.showwarning  # at once, not at the end: an evaluation takes hours

        def show_said(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            text = said(str(message))
            show(message if text == str(message) else category(text), category, filename, lineno, file, line)

        warnings.showwarning = show_said
        try:
            yield
        except ValueError as error:
            raise ValueError(said(str(error))) from error


def _refuse(where: str, given: Mapping[str, Any], own: tuple[str, ...]) -> None:
    clash = [name for name in given if name in own]
    if clash:
        raise ValueError(f"{where}: {', '.join(clash)} does not belong here: the study gives it.")
