"""The exercise of 05_attention_kernels that sets a run's attention kernel and head chunks, judged by the planner."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from ultralong.attention import KERNELS
from ultralong.course.exercises.machinery.nb07_checks import GIB, totals
from ultralong.planner.machine import load_machine
from ultralong.planner.shapes import planned_model, shape_of
from ultralong.planner.workload import Workload
from ultralong.training.config import TrainConfig, preset
from ultralong.utils.settings import load

SETTINGS = ("kernel", "head_chunks")
MOST_SECONDS = 480  # of a step; the preset itself is planned with 461


@functools.cache
def half_million_on_one() -> Workload:
    """Llama-3.1-8B, rows of 524,288 tokens on one H200: the preset's run without its kernel and head chunks."""
    config = load(TrainConfig, preset("llama31-8b-512k-1gpu"))
    config = replace(config, parallel=replace(config.parallel, kernel="auto", head_chunks=None))
    model, _ = planned_model(config.model, config.base_model)
    return Workload(config, model, shape_of(model), load_machine("h200"), 2**19, 1)


def planned(kernel: str, head_chunks: int | None) -> tuple[float, float]:
    """GiB on the GPU and seconds of a step with these settings of `parallel:`."""
    job = half_million_on_one()
    parallel = replace(job.config.parallel, kernel=kernel, head_chunks=head_chunks)
    gpu, _, seconds = totals(replace(job, config=replace(job.config, parallel=parallel)))
    return gpu, seconds


def check_run(answer: Any) -> str:
    """With these settings the planned step fits the GPU, and is as fast as the fastest kernel makes it."""
    keys = set(answer) if isinstance(answer, dict) else set()
    assert keys == set(SETTINGS), (
        f"Give a dict with the keys {' and '.join(SETTINGS)}; found {sorted(keys) or answer!r}."
    )
    kernel, chunks = (answer[key] for key in SETTINGS)
    assert kernel in ("auto", *KERNELS), f"kernel is one of flash4, cudnn, flash and auto, found {kernel!r}."
    assert chunks is None or type(chunks) is int, f"head_chunks is a whole number or None, found {chunks!r}."
    try:
        gpu, seconds = planned(kernel, chunks)
    except ValueError as error:
        raise AssertionError(f"The library refuses it: {error}") from error
    there, whole = half_million_on_one().machine.memory / GIB, planned(kernel, None)[0]
    assert seconds <= MOST_SECONDS, (
        f"{gpu:.0f} GiB, but a step takes {seconds:.0f} s with the kernel {kernel!r}. At this length nearly all of "
        "a step is attention: look at the roofline for a faster one. (`auto` is planned with what comes with torch.)"
    )
    why = (
        "All heads go at once here, and so do their float32 buffers: take several chunks."
        if gpu == whole
        else f"All heads at once would take {whole:.1f}. The heads of a chunk are copied first, and {chunks} chunks "
        "save less than that costs: take more."
    )
    assert gpu <= there, f"{gpu:.1f} GiB, and there are {there:.1f}. {why}"
    return (
        f"{gpu:.1f} of {there:.1f} GiB and {seconds:.0f} s a step by the plan. With {kernel} and all heads at once it "
        f"would be {whole:.1f} GiB."
    )
