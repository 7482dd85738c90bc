"""What is kept on the GPU, moved to host memory or computed again, chosen from a budget.

Every checkpointed layer leaves an input, which has to be somewhere, and an attention result, which may be computed
again. Both are of about one size. Results are worth more on the device than inputs (a layer needs its input a whole
layer before its result), so inputs go to the host first; what room is left anywhere then goes to results, the last
layers' on the device.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ultralong.plan.estimate import FRAGMENTED, IN_FLIGHT, Job, gpu_lines, host_lines
from ultralong.training.config import MemoryConfig


def choose_memory(job: Job, gpu_memory: float, host_memory: float | None) -> MemoryConfig:
    """The memory plan under which a step computes as little as possible again.

    Args:
        job: The run; its tiles and everything but what is kept and moved is taken as it is.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of host memory for one process; None moves nothing.

    Returns:
        The run's memory settings with layers checkpointed and the three numbers of layers set. Where not even all the
        inputs find room, as many as the host takes are moved: `plan` then says by how much it is short.
    """
    layers = job.shape.layers
    plain = replace(job.config.memory, checkpoint_layers=True, attention_kept=0, attention_host=0, inputs_host=0)
    base = replace(job, config=replace(job.config, memory=plain))
    # The followed step holds every layer's input; what is left without them is what all the moving is for.
    fixed = sum(line.value for line in gpu_lines(base) if line.counts)
    grown = 1 + FRAGMENTED
    room = gpu_memory - fixed + grown * layers * job.input_bytes
    always = sum(line.value for line in host_lines(base))
    host = 0.0 if host_memory is None else max(0.0, host_memory - always)

    inputs = min(layers, math.floor(host / job.input_bytes))
    inputs = 0 if room >= grown * layers * (job.input_bytes + job.result_bytes + job.statistic_bytes) else inputs
    host -= inputs * job.input_bytes
    room -= grown * (layers - max(0, inputs - IN_FLIGHT)) * job.input_bytes
    each = grown * (job.result_bytes + job.statistic_bytes)
    kept = max(0, min(layers, math.floor(room / each)))
    moved = min(layers - kept, math.floor(host / job.result_bytes))
    if moved:  # some on their way need room on the device as well
        kept = max(0, min(kept, math.floor((room - moved * grown * job.statistic_bytes) / each) - IN_FLIGHT))
        moved = min(layers - kept, moved + IN_FLIGHT) if host >= (moved + IN_FLIGHT) * job.result_bytes else moved
    return replace(plain, attention_kept=kept, attention_host=moved, inputs_host=inputs)
