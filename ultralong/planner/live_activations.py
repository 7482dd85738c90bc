"""What waits on a GPU at each layer's turn in the backward pass.

It follows the memory plan as `ultralong.training.activation_store` and `ultralong.training.layers` carry it out: the
last layers'
attention results and the later inputs stay on the device, what was moved to the host starts to come back one turn
ahead, and inputs that were not kept are made again a group at a time, with the group's results that were not kept
either.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong.planner.workload import Job


@dataclass(frozen=True)
class Turn:
    """A layer's turn, or the loss before all turns.

    Attributes:
        done: Layers that had theirs, whose gradients are there.
        inputs: Layer inputs on the device, the one at work among them.
        results: Attention results on the device beside the one at work.
    """

    done: int
    inputs: int
    results: int


def at_the_loss(job: Job) -> Turn:
    """What the forward pass has left; what goes to the host is taken to be there."""
    kept, _, away = job.placed
    return Turn(0, job.inputs - away, kept)


def turns(job: Job) -> list[Turn]:
    """Of all layers, the last one's first."""
    return [_turn(job, layer) for layer in reversed(range(job.shape.layers))]


def _turn(job: Job, layer: int) -> Turn:
    (kept, moved, away), every = job.placed, job.config.memory.checkpoint_every
    group = layer // every  # layers of one kept input, which is its first layer's
    on_device = max(0, group + 1 - away)  # of this group and those before
    made = layer - group * every
    # The kept input whose turn is next starts to come back, if it was moved; that of this turn has.
    coming = int(0 <= (group if made else group - 1) < away)
    came = int(not made and group < away)
    place = job.shape.layers - layer  # of the layer below, counted from the last one
    results = max(0, kept - place) + int(layer > 0 and kept <= place < kept + moved)
    # Results that were neither kept nor moved are there again for all layers of the group below this one.
    again = sum(job.shape.layers - 1 - below >= kept + moved for below in range(group * every, layer))
    return Turn(job.shape.layers - 1 - layer, on_device + made + came + coming, results + again)
