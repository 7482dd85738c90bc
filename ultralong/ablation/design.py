"""Everything that one arm of a study does: the dataclasses that are the schema of a study's `base`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from ultralong.utils.units import Tokens


@dataclass(frozen=True)
class Scaling:
    """How RoPE is rescaled; as in `ultralong.checkpoints.extend.extend`.

    Attributes:
        method: "auto", or one of `ultralong.rope.METHODS`.
        attention_factor: Factor on cosine and sine; 1.0 switches YaRN's temperature off.
        original_window: Tokens of the unscaled pretraining, where the config does not say it.
        theta: Another RoPE base.
        ramp: For yarn: what its ramp is linear in, as in `ultralong.rope.RopeScaling`.
        alpha: Turns at the slow end of the ramp; None is the recipe's 1.
        beta: Turns at the fast end of the ramp; None is the recipe's 4.
        short_factors: For longrope: a factor a pair, up to the old window.
        long_factors: For longrope: a factor a pair, beyond it.
    """

    method: str = "auto"
    attention_factor: float | None = None
    original_window: Tokens | None = None
    theta: float | None = None
    ramp: str = "dimension"
    alpha: float | None = None
    beta: float | None = None
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """One step of extension: rescale to a window, then train on rows of that window.

    One of the window before it, and of its factor, rescales nothing: its training starts from the model trained there.

    Attributes:
        to: Tokens of the window.
        steps: Optimizer steps; None is the training's. 0 rescales and trains nothing.
        factor: Scaling factor; None is the window over the one of the unscaled pretraining.
        row: Tokens of a row to train on; None is the window. Shorter ones go with `training.skip_positions_to`.
        training: Keys of a training config that differ from the arm's in this stage.
    """

    to: Tokens
    steps: int | None = None
    factor: float | None = None
    row: Tokens | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of a row to train on."""
        return self.row or self.to


@dataclass(frozen=True)
class Rows:
    """What packed rows are made from.

    Attributes:
        recipe: Name of a data recipe, its YAML file, or a folder of texts.
        limit: Take about this many tokens of each source at most.
        max_characters: Cut longer documents of every source into several; None is what the recipe says.
        packing: Keys of the recipe's packing that are replaced, such as join or mask_documents.
        changes: Other keys of the recipe that are replaced, with dots for groups.
    """

    recipe: str
    limit: Tokens | None = None
    max_characters: int | None = None
    packing: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sft:
    """SFT on conversations, short or as long as the window, after the last stage.

    Attributes:
        rows: What conversations are packed from: a recipe of kind chat. They get the chat template of the model before.
        length: Tokens of a row; conversations are packed whole and don't see each other.
        training: Keys of a training config, and `preset`, the name of the one that they change. Without either the
            learning rate is the paper's for SFT, 5e-6.
        examples: Take so many conversations, by category as the recipe says; None takes all.
        start_share: After SFT, average as with `Design.start_share`: the order of SmolLM3, which merges last.
    """

    rows: Rows
    length: Tokens
    training: dict[str, Any]
    examples: int | None = None
    start_share: float = 0.0

    def __post_init__(self) -> None:
        if self.rows.max_characters is not None:
            raise ValueError("rows.max_characters cuts documents; conversations are whole (packing.max_tokens).")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be 1 or more, found {self.examples}.")
        _check_share(self.start_share)


@dataclass(frozen=True)
class Design:
    """Everything that one arm does.

    Attributes:
        model: Folder or hub id of the model before, or miniature.
        stages: Windows in order; one is extension in one step.
        rows: Rows to train on, packed anew for each window.
        heldout: Documents kept apart: prompts are filled with them, and perplexity is measured on them.
        training: Keys of a training config, and `preset`, the name of the one that they change.
        evaluation: Keys of `RunSettings`: tests, lengths, samples.
        scaling: How RoPE is rescaled.
        processes: Processes of a training run on this machine; None trains in this one.
        start_share: After the last stage, average the weights with those of the model rescaled to the last window and
            not trained, which get this share (`ultralong.checkpoints.merge`); 0 leaves the trained ones as they are.
            With `sft` too, SFT starts from the average, so that an arm without SFT shares it; `sft.start_share`
            averages after SFT.
        sft: SFT after that. With `training.steps: 0` it starts from the model that is rescaled and not trained.
    """

    model: str
    stages: tuple[Stage, ...]
    rows: Rows
    heldout: Rows
    training: dict[str, Any]
    evaluation: dict[str, Any]
    scaling: Scaling = field(default_factory=Scaling)
    processes: int | None = None
    start_share: float = 0.0
    sft: Sft | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must hold at least one window.")
        scaled = [(stage.to, stage.factor) for stage in self.stages]
        if any(after[0] <= before[0] and after != before for before, after in itertools.pairwise(scaled)):
            raise ValueError(
                "stages must rise from window to window, or stay at one with its factor to train on there, found "
                f"windows {[to for to, _ in scaled]} with factors {[factor for _, factor in scaled]}."
            )
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be 1 or more, found {self.processes}.")
        _check_share(self.start_share)

    @property
    def window(self) -> int:
        """Tokens of the last window."""
        return self.stages[-1].to


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"start_share must be 0 or more and below 1, found {share}.")
