"""Bytes, seconds, GPU-hours and cost of a run before anything starts, from the config that the trainer reads."""

from ultralong.plan.lines import Line, Plan
from ultralong.plan.machine import Machine, load_machine
from ultralong.plan.planner import plan

__all__ = ["Line", "Machine", "Plan", "load_machine", "plan"]
