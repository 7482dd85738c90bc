"""What is kept on the GPU, moved to host memory or computed again, chosen from a budget.

Every checkpointed layer leaves an input and an attention result, both of about one size. A result that finds no room is
attention computed again; an input that finds none is, where the layers' backward passes are written out, matrix
products made again from an earlier input and the results between. Results are worth more on the device than inputs (a
layer needs its input a whole layer before its result), so inputs go to the host first; what room is left anywhere then
goes to results, the last layers' on the device. How many inputs are kept at all is the number that makes the step the
shortest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ultralong.planner.memory import HOST_BYTES, gpu_lines
from ultralong.planner.step_time import step_lines
from ultralong.planner.workload import Job
from ultralong.training.config import MemoryConfig

EVERY = (1, 2, 3, 4, 5, 6, 8)  # inputs kept: of each layer, of each second, ...


def choose_memory(job: Job, gpu_memory: float, host_memory: float | None) -> MemoryConfig:
    """The memory plan under which a step takes the least time.

    Args:
        job: The run; its tiles and everything but what is kept and moved is taken as it is.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of host memory for one process; None moves nothing.

    Returns:
        The run's memory settings with layers checkpointed and the numbers of layers set. Where nothing fits, the plan
        that is short by least: `plan` then says by how much.
    """
    host = 0.0 if host_memory is None else max(0.0, host_memory - HOST_BYTES)
    found = list(_candidates(job, gpu_memory, host))
    fitting = [each for each in found if _bytes(each) <= gpu_memory]
    if not fitting:
        return min(found, key=_bytes).config.memory
    # Of plans that are equally fast the first, which makes the fewest inputs again and moves the least.
    return min(fitting, key=lambda each: round(sum(line.value for line in step_lines(each)), 3)).config.memory


def _bytes(job: Job) -> float:
    return sum(line.value for line in gpu_lines(job) if line.counts)


def _candidates(job: Job, gpu_memory: float, host: float) -> Iterator[Job]:
    """For each number of inputs kept, and of those moved: the plan that keeps the most results on the GPU."""
    plain = replace(job.config.memory, activation_checkpointing=True)
    for every in EVERY if plain.layer_tile else EVERY[:1]:
        inputs = -(-job.shape.layers // every)
        for away in sorted({0, min(inputs, math.floor(host / job.input_bytes))}):
            room = math.floor((host - away * job.input_bytes) / job.result_bytes)
            for kept in range(job.shape.layers, -1, -1):
                memory = replace(
                    plain,
                    checkpoint_every=every,
                    layer_inputs_offloaded=away,
                    attention_outputs_on_gpu=kept,
                    attention_outputs_offloaded=min(job.shape.layers - kept, room),
                )
                planned = replace(job, config=replace(job.config, memory=memory))
                if _bytes(planned) <= gpu_memory or kept == 0:
                    yield planned
                    break
