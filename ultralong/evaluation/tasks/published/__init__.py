"""Benchmarks whose texts are published: LV-Eval (eleven sets, five lengths) and six sets of InfiniteBench.

Prompts, answer budgets and scores are those of the official code, read from the YAML files here. The texts themselves
are read from a local folder or the hub and are no part of this package. What is too long is cut in the middle, as the
official code does.
"""

from ultralong.evaluation.tasks.published.registry import INFINITEBENCH_PUBLISHED, LVEVAL_TASKS

__all__ = ["INFINITEBENCH_PUBLISHED", "LVEVAL_TASKS"]
