"""Layer inputs and attention outputs on a GPU at each layer's turn in the backward pass.

It follows the memory plan as `activation_store` and `layers` of `ultralong.training.memory` carry it out: the last
layers' attention outputs and the later inputs stay on the device, what was offloaded is prefetched one layer ahead, and
inputs that were not stored are recomputed a group at a time, with the group's attention outputs that were
not stored either.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong.planner.workload import Workload


@dataclass(frozen=True)
class LiveActivations:
    """What is on the device at a layer's turn, or in the loss before all turns.

    Attributes:
        layers_done: Layers whose backward pass is over, whose gradients are there.
        inputs: Layer inputs on the device, that of the layer at work among them.
        outputs: Attention outputs on the device, beside that of the layer at work.
        attention_done: The layer at work finds its attention output, stored or recomputed with its group: queries, keys
            and values come after its feed-forward layer's gradients only.
    """

    layers_done: int
    inputs: int
    outputs: int
    attention_done: bool = True


def live_in_loss(workload: Workload) -> LiveActivations:
    """What the forward pass has left; what is offloaded is taken to have arrived on the host."""
    on_gpu, _, offloaded_inputs = workload.placed
    return LiveActivations(0, workload.checkpoints - offloaded_inputs, on_gpu)


def live_in_backward(workload: Workload) -> list[LiveActivations]:
    """At all layers' turns, the last layer's first."""
    return [_live_at(workload, layer) for layer in reversed(range(workload.shape.layers))]


def _live_at(workload: Workload, layer: int) -> LiveActivations:
    (on_gpu, offloaded, offloaded_inputs), every = workload.placed, workload.config.memory.checkpoint_every
    group = layer // every  # layers between two stored inputs; the first layer's input is the stored one
    on_device = max(0, group + 1 - offloaded_inputs)  # of this group and those before
    recomputed = layer - group * every
    # The stored input whose turn is next is prefetched, if it was offloaded; that of this turn has come back.
    prefetched = int(0 <= (group if recomputed else group - 1) < offloaded_inputs)
    fetched = int(not recomputed and group < offloaded_inputs)
    place = workload.shape.layers - layer  # of the layer below, counted from the last one
    outputs = max(0, on_gpu - place) + int(layer > 0 and on_gpu <= place < on_gpu + offloaded)
    # Outputs that were neither stored nor offloaded are there again for all layers of the group below this one.
    again = sum(workload.shape.layers - 1 - below >= on_gpu + offloaded for below in range(group * every, layer))
    inputs = on_device + recomputed + fetched + prefetched
    last_of_group = layer == min(group * every + every, workload.shape.layers) - 1
    done = place <= on_gpu + offloaded or not last_of_group
    return LiveActivations(workload.shape.layers - 1 - layer, inputs, outputs + again, done)
