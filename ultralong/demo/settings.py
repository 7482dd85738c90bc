"""What the demo does: `ultralong/presets/demo-*.yaml` are of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultralong.training.config import preset
from ultralong.utils import settings


@dataclass(frozen=True)
class DemoStage:
    """Settings of one training stage.

    Attributes:
        steps: Optimizer steps.
        global_batch_size: Rows of a step.
        lr: Peak learning rate; warm-up over a tenth of the steps, then a linear fall.
        micro_batch_size: Rows of one forward pass.
    """

    steps: int
    global_batch_size: int
    lr: float
    micro_batch_size: int = 1


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; `ultralong/presets/demo-*.yaml` are of these.

    Attributes:
        model: `miniature`, `smollm2`, or a checkpoint's folder or hub id.
        target: The new window, in tokens.
        documents: Recipe of the documents that continued pretraining reads.
        heldout: Recipe of documents kept apart: needles are hidden in them, perplexity is measured on them.
        conversations: Recipe of the conversations of SFT.
        pretraining: The continued pretraining.
        tuning: The SFT.
        questions: Share of SFT examples that are questions about a passage, as long as the old window at most.
        examples: SFT examples made available.
        method: Scaling method, as in `ultralong extend`.
        factor: Scaling factor; None is the target over the old window. The recipe takes twice that (128 for 128K to
            1M), because a model is weakest at the very end of its window.
        beta: Rotations within the old window above which YaRN leaves a pair alone; None is the recipe's 4.
        processes: Sequence-parallel processes of continued pretraining; None is 2 on CPU and one per GPU.
        dtype: Compute type of training.
        lengths: Prompt lengths of the needle grid.
        depths: Depths of the needle grid.
        samples: Needles in each cell.
        perplexity_rows: Rows of held-out text that perplexity is measured on.
        limit: Take about this many tokens of the documents at most; None takes all, however few are read.
        chunk: Tokens of one prefill pass in evaluation; None is all at once.
        seed: Seed of row order, questions and needles.
    """

    model: str
    target: int
    documents: str
    heldout: str
    conversations: str
    pretraining: DemoStage
    tuning: DemoStage
    lengths: tuple[int, ...]
    questions: float = 0.5
    examples: int = 400
    method: str = "auto"
    factor: float | None = None
    beta: float | None = None
    processes: int | None = None
    dtype: str = "float32"
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    perplexity_rows: int = 8
    limit: int | None = None
    chunk: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if max(self.lengths) > self.target:
            raise ValueError(f"lengths go up to {max(self.lengths)}, beyond the target window of {self.target}.")
        if not 0 <= self.questions <= 1:
            raise ValueError(f"questions is a share from 0 to 1, found {self.questions}.")


def load(model: str, changes: Sequence[str] = ()) -> DemoConfig:
    """The demo's settings for a model's name (`miniature`, `smollm2`) or a YAML file, with `key=value` changes.

    Raises:
        ValueError: There are no such settings, or a change does not fit.
    """
    return settings.load(DemoConfig, preset(model if Path(model).is_file() else f"demo-{model}", demos=True), changes)
