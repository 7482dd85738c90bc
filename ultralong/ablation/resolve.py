"""What an arm comes to: its training configs, rows and evaluation, and the keys under which they are shared.

A key is a hash of everything that decides the bytes of an artefact. Arms that agree up to a point have the same keys up
to it, so what they share is built once, and nothing is taken for something that it is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ultralong.ablation.configs import has_steps, run_settings, sft_config, training_config
from ultralong.ablation.design import Design, Rows, Scaling, Sft, Stage
from ultralong.ablation.keys import conversations_key, conversations_of, key, model_key, recipe_of, rows_key, told
from ultralong.ablation.outcomes import BEYOND, LONGPPL, NEEDLES, PERPLEXITY, TESTS
from ultralong.ablation.study import BASE_ARM, Study
from ultralong.checkpoints.config import load_config
from ultralong.checkpoints.files import locate
from ultralong.checkpoints.rescale import Extension, choose_scaling
from ultralong.data.chat.template import encode_chat
from ultralong.data.recipe.schema import Recipe
from ultralong.data.rows.separators import PackSettings, resolve_separators
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.evaluation.tasks.groups import SPECIAL
from ultralong.training.config import TrainConfig

NOWHERE = Path("not-made-yet")  # stands for folders in what is checked and hashed before they are there


@dataclass(frozen=True)
class Link:
    """One stage of one arm and seed, by the keys of its parts.

    Attributes:
        stage: The window.
        extended: Key of the rescaled checkpoint; that of the run before where its window stays.
        rows: Key of the packed rows.
        trained: Key of the run; `extended` where the stage has no steps.
    """

    stage: Stage
    extended: str
    rows: str
    trained: str

    @property
    def trains(self) -> bool:
        """Whether the stage has steps."""
        return self.trained != self.extended


def base_folder(design: Design) -> Path:
    """Folder of the model before."""
    return locate(design.model)


def extension_key(before: str, stage: Stage, scaling: Scaling) -> str:
    """Key of a checkpoint that is rescaled to a stage's window."""
    return key("extended", before, stage.to, stage.factor, told(scaling))


def links(design: Design, seed: int, base: str) -> list[Link]:
    """The stages of an arm and seed, by their keys.

    A stage of no steps that another follows is left out: the next one rescales anew. So an arm whose stages all have
    none is the model before, rescaled to the last window in one step.

    Args:
        design: The arm.
        seed: Training seed.
        base: Key of the model before.
    """
    found: list[Link] = []
    before = base
    for stage in design.stages:
        trains = has_steps(design, stage)
        if not trains and stage is not design.stages[-1]:
            continue
        further = bool(found) and found[-1].stage.to == stage.to  # trained there, so rescaled there
        extended = before if further else extension_key(before, stage, design.scaling)
        rows, before = rows_key(design.rows, stage.length, base), extended
        if trains:
            config = training_config(design, stage, seed, Path("model"), Path("rows"), Path("out"))
            before = key("trained", extended, rows, told(config), design.processes)
        found.append(Link(stage, extended, rows, before))
    return found


def pretrained_key(design: Design, seed: int, base: str) -> str:
    """Key of the model after the last stage: the trained one, or its average with the rescaled, untrained one."""
    return _merged_key(design, links(design, seed, base)[-1].trained, design.start_share, base)


def tuned_key(design: Design, sft: Sft, seed: int, base: str) -> str:
    """Key of the run of SFT."""
    config = sft_config(sft, seed, Path("model"), Path("rows"), Path("out"))
    rows = conversations_key(sft, base, base_folder(design))
    return key("tuned", pretrained_key(design, seed, base), rows, told(config), design.processes)


def final_key(design: Design, seed: int, base: str) -> str:
    """Key of the model that is measured."""
    if design.sft is None:
        return pretrained_key(design, seed, base)
    return _merged_key(design, tuned_key(design, design.sft, seed, base), design.sft.start_share, base)


def _merged_key(design: Design, model: str, share: float, base: str) -> str:
    if not share:
        return model
    return key("merged", model, extension_key(base, design.stages[-1], design.scaling), share)


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
            _check_training(design, study.seeds[0])
            for stage in design.stages:
                choose_scaling(config, extension(stage, design.scaling))
        except ValueError as error:
            raise ValueError(f"arm {arm}: {error}") from error
        if final in done:
            same = "changes nothing: it does what the base does" if done[final] == BASE_ARM else ""
            raise ValueError(f"arm {arm} {same or f'does what arm {done[final]} does'}. Remove it, or change it.")
        done[final] = arm
    return name


def _check_training(design: Design, seed: int) -> None:
    """Refuse rows that are none for a training, and an arm that has no training."""
    texts = _recipe(design.rows, "documents", "rows.recipe")
    _recipe(design.heldout, "documents", "heldout.recipe").row_settings(design.window)
    trained = [stage for stage in design.stages if has_steps(design, stage)]
    settings = texts.row_settings(design.stages[0].length)
    if trained and isinstance(settings, PackSettings):
        try:  # an arm may be packed after hours of others' training
            resolve_separators(settings, load_tokenizer(base_folder(design)))
        except ValueError as error:
            raise ValueError(f"rows.packing: {error}") from error
    for stage in trained:
        config = training_config(design, stage, seed, NOWHERE, NOWHERE, NOWHERE)
        _check_rows(config, getattr(texts.row_settings(stage.length), "mask_documents", False), "training")
    if not trained and design.start_share:
        raise ValueError("start_share averages what is trained with its start, and the training has no steps.")
    if design.sft is not None:
        _check_sft(design, design.sft, seed)
    elif not trained:
        raise ValueError(
            "training.steps: 0 leaves the rescaled model, which every arm is compared with as it is. Give steps, or "
            "an SFT in sft."
        )


def _check_sft(design: Design, sft: Sft, seed: int) -> None:
    _recipe(sft.rows, "chat", "sft.rows.recipe")
    conversations_of(sft).row_settings(sft.length)
    if sft.length > design.window:
        raise ValueError(f"sft.length, {sft.length:,} tokens of a row, is beyond the window of {design.window:,}.")
    _check_rows(sft_config(sft, seed, NOWHERE, NOWHERE, NOWHERE), True, "sft.training")
    try:  # hours of pretraining come before the template is used
        talk = [{"role": "user", "content": "Is it dark?"}, {"role": "assistant", "content": "It is."}]
        encode_chat(load_tokenizer(base_folder(design)), talk)
    except ValueError as error:
        raise ValueError(f"sft: {error}") from error


def _recipe(rows: Rows, kind: str, where: str) -> Recipe:
    """A recipe of that kind."""
    recipe = recipe_of(rows)
    if recipe.kind != kind:
        found, place = ("conversations", "sft.rows") if recipe.kind == "chat" else ("documents", "rows")
        raise ValueError(f"{where}: {rows.recipe} is of {found}, which belong in {place}.")
    return recipe


def _check_rows(config: TrainConfig, masked: bool, where: str) -> None:
    if config.skip_positions_to is not None and masked:
        raise ValueError(f"{where}.skip_positions_to cuts whole rows in two, and rows.packing masks documents.")
    if config.anchor and not masked:
        raise ValueError(f"{where}.anchor needs masked documents: set rows.packing.mask_documents: true.")
    if config.long_ce.weight_cap and config.length is not None and config.length < config.long_ce.shortest:
        raise ValueError(
            f"{where}.long_ce weighs what stands in {config.long_ce.shortest:,} tokens (short_context and stride) or "
            f"more, and rows have {config.length:,}: set {where}.long_ce.short_context and stride lower."
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
            "base.evaluation.tasks has longppl: name base.evaluation.evaluator, the one model that chooses the key "
            "tokens of all arms (one that reads this far)."
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
