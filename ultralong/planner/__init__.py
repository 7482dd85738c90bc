"""Bytes, seconds, GPU-hours and cost of a run before anything starts, from the config that the trainer reads."""

from ultralong.planner.machine import Machine, load_machine
from ultralong.planner.planner import plan
from ultralong.planner.report import Line, Plan

__all__ = ["Line", "Machine", "Plan", "load_machine", "plan"]
