"""A step whose loss is no number, or far above those before it, stops the run before it updates anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ultralong.training.batches import Batch

if TYPE_CHECKING:
    from ultralong.training.step import Run

RECENT, FEWEST = 32, 8  # steps that a loss spike is measured against, and how few of them are too few


def check_loss(run: Run, step: int, loss: float, batches: Sequence[Batch]) -> None:
    """Stop before the update if the loss is no number, or far above the steps before."""
    if not math.isfinite(loss):
        stop_run(run, step, f"the loss is {loss}", batches)
    jump = run.config.loss_spike_threshold
    if jump and len(run.recent) >= FEWEST and loss > (usual := sum(run.recent) / len(run.recent)) + jump:
        stop_run(
            run,
            step,
            f"the loss is {loss:.3f}, {loss - usual:.3f} above the mean of the {len(run.recent)} steps "
            f"before (loss_spike_threshold is {jump})",
            batches,
        )


def stop_run(run: Run, step: int, what: str, batches: Sequence[Batch]) -> NoReturn:
    """Stop, and name the step, its rows and the checkpoint to resume from."""
    rows = "; ".join(run.order.describe(place) for batch in batches for place in batch.places[:4])
    saved = run.folder.checkpoints()
    last = f"The last good checkpoint is {saved[-1][1]}." if saved else "There is no checkpoint yet."
    raise FloatingPointError(
        f"Step {step + 1}: {what}. No update was made. Rows on this process: {rows}. {last} Lower the learning rate, "
        "or look at those rows."
    )
