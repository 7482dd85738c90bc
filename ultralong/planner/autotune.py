"""The memory plan under which a step is fastest, from a budget: what is stored, offloaded and recomputed.

Every checkpointed layer leaves an input and an attention output, both of about one size. An output that finds no room
is attention recomputed; an input that finds none is, where layers have a custom backward pass, matrix products
recomputed from an earlier input and the outputs between. Outputs are worth more on the device than inputs (a layer
needs its input a whole layer before its output), so inputs are offloaded first; what room is left anywhere then goes to
outputs, the last layers' on the device. How many inputs are stored at all is the number that makes the step shortest.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from ultralong.planner.growth import Growth
from ultralong.planner.memory import HOST_BYTES, gpu_total, staged_bytes
from ultralong.planner.step_time import step_time
from ultralong.planner.workload import Workload
from ultralong.training.config import MemoryConfig

EVERY = (1, 2, 3, 4, 5, 6, 8)  # inputs stored: of each layer, of each second, ...


def autotune_memory(workload: Workload, gpu_memory: float, host_memory: float | None) -> MemoryConfig:
    """The memory plan under which a step takes the least time.

    Args:
        workload: The run; its tiles and everything but what is stored and offloaded is taken as it is.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of host memory for one process; None offloads nothing.

    Returns:
        The run's memory settings with layers checkpointed and the numbers of layers set. Where nothing fits, the plan
        that exceeds the GPU by the least: `plan` then says by how much.
    """
    host = 0.0 if host_memory is None else max(0.0, host_memory - HOST_BYTES - staged_bytes(workload))
    found = list(_candidates(workload, gpu_memory, host))
    fitting = [each for each in found if gpu_total(each) <= gpu_memory]
    if not fitting:
        return min(found, key=gpu_total).config.memory
    # Of plans that are equally fast the first, which recomputes the fewest inputs and offloads the least.
    return min(fitting, key=lambda each: round(sum(line.value for line in step_time(each)), 3)).config.memory


def longest_row(workload: Workload, gpu_memory: float, host_memory: float | None, step: int = 8192) -> Workload | None:
    """The run with the longest row for which some memory plan fits, and that plan.

    Args:
        workload: The run, its layers checkpointed; memory is taken to grow in straight lines with the row.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of host memory for one process; None offloads nothing.
        step: Tokens on one GPU in multiples of which rows are tried.

    Returns:
        None where not even the shortest row fits.
    """
    growth = Growth(workload)

    def fitted(steps: int) -> Workload:
        at = growth.at(steps * step)
        return at.with_memory(autotune_memory(at, gpu_memory, host_memory))

    def too_long(steps: int) -> bool:
        return gpu_total(fitted(steps)) > gpu_memory

    most = next(steps for steps in (2**i for i in itertools.count()) if too_long(steps))
    longest = bisect_left(range(most), True, lo=1, key=too_long) - 1
    return fitted(longest) if longest else None


def _candidates(workload: Workload, gpu_memory: float, host: float) -> Iterator[Workload]:
    """For each number of inputs stored, and of those offloaded: the plan that stores the most outputs on the GPU."""
    plain, layers = replace(workload.config.memory, activation_checkpointing=True), workload.shape.layers
    for every in EVERY if plain.layer_tile else EVERY[:1]:
        inputs = -(-layers // every)
        for away in sorted({0, min(inputs, math.floor(host / workload.input_bytes))}):
            room = math.floor((host - away * workload.input_bytes) / workload.output_bytes)
            for on_gpu in range(layers, -1, -1):
                memory = replace(
                    plain,
                    checkpoint_every=every,
                    layer_inputs_offloaded=away,
                    attention_outputs_on_gpu=on_gpu,
                    attention_outputs_offloaded=min(layers - on_gpu, room),
                )
                planned = workload.with_memory(memory)
                if gpu_total(planned) <= gpu_memory or on_gpu == 0:
                    yield planned
                    break
