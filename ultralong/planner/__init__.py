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


_HOME = {
    "Machine": "machine",
    "Plan": "report",
    "PlanLine": "report",
    "decide_sharing": "sharing.decide",
    "is_model": "models.run",
    "load_machine": "machine",
    "plan": "planner",
    "run_of_model": "models.run",
}


def __getattr__(name: str) -> Any:
    """Load one of the names above."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found  # asked for once, and there for what reads the module's dictionary, as pdoc does
    return found
