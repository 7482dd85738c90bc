"""Benchmarks whose texts are published: LV-Eval, six sets of InfiniteBench, and LongBench v2 and Pro.

Prompts, answer budgets and scores are those of the official code, read from the YAML files here. The texts themselves
are read from a local folder or the hub and are no part of this package. What is too long is cut in the middle, as the
official code does.
"""

from __future__ import annotations

from functools import partial

from ultralong.evaluation.tasks.published import scores
from ultralong.evaluation.tasks.published.catalogue import catalogue
from ultralong.evaluation.tasks.published.longbench import LONGBENCH_TASKS
from ultralong.evaluation.tasks.published.reader import prepare
from ultralong.evaluation.tasks.task import Task

# Words of English or characters of Chinese: 256k words are some 350,000 of Llama's tokens.
LEVELS = ("16k", "32k", "64k", "128k", "256k")

CAPABILITY = {"longbook_sum_eng": "summarisation", "code_debug": "reasoning"}  # the other sets answer questions


def _task(benchmark: str, name: str, level: str | None, extra: tuple[str, ...]) -> Task:
    known = catalogue(benchmark)[name]
    full = f"{benchmark}_{name}" + ("" if level is None else f"_{level}")
    return Task(
        full,
        known.max_new_tokens,
        partial(prepare, benchmark, name, level),
        getattr(scores, known.score),
        extra,
        needs="jieba" if known.score in scores.SEGMENTED else "",
        capability=CAPABILITY.get(name, "question answering"),
    )


LVEVAL_TASKS = {
    task.name: task
    for level in LEVELS
    for name in catalogue("lveval")
    for task in (_task("lveval", name, level, ("keywords",)),)
}
INFINITEBENCH_PUBLISHED = {
    task.name: task for name in catalogue("infinitebench") for task in (_task("infinitebench", name, None, ()),)
}

__all__ = ["INFINITEBENCH_PUBLISHED", "LEVELS", "LONGBENCH_TASKS", "LVEVAL_TASKS"]
