"""Bytes, seconds, GPU-hours and cost of a run before anything starts, from the config that the trainer reads.

Names are loaded when they are used, so that the process that traces attention (`ultralong.planner.traces.child`) starts
without the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultralong.planner.machine import Machine, load_machine
    from ultralong.planner.models.run import is_model, run_of_model
    from ultralong.planner.planner import plan
    from ultralong.planner.report import Plan, PlanLine
    from ultralong.planner.sharing.decide import decide_sharing

__all__ = ["Machine", "Plan", "PlanLine", "decide_sharing", "is_model", "load_machine", "plan", "run_of_model"]


def __getattr__(name: str) -> Any:
    """Load one of the names above."""
    if name in ("Machine", "load_machine"):
        return getattr(import_module("ultralong.planner.machine"), name)
    if name in ("Plan", "PlanLine"):
        return getattr(import_module("ultralong.planner.report"), name)
    if name in ("is_model", "run_of_model"):
        return getattr(import_module("ultralong.planner.models.run"), name)
    if name == "decide_sharing":
        return import_module("ultralong.planner.sharing.decide").decide_sharing
    if name == "plan":
        return import_module("ultralong.planner.planner").plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
