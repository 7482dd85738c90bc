"""A step's record for trackers: every number of the log, whatever it is nested in; and a file for Prometheus."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process

from ultralong.utils.extras import require

PROMETHEUS = "prometheus"
FILE = "metrics.prom"
EXTRA = "serve"  # which installs prometheus-client


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """All numbers of a record by name; those in lists and groups as `name/part`, as trackers want them.

    >>> scalars({"loss": 1.5, "loss_by_position": [2.0, None], "ranks": {"peak_gib": [7, 8]}})
    {'loss': 1.5, 'loss_by_position/0': 2.0, 'ranks/peak_gib/0': 7, 'ranks/peak_gib/1': 8}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(place): each for place, each in enumerate(value)}
        if isinstance(value, dict):
            found |= {f"{name}/{part}": number for part, number in scalars(value).items()}
        elif isinstance(value, float | int):
            found[name] = value
    return found


class PrometheusFile(GeneralTracker):
    """Tracker `prometheus`: the last step's numbers in `metrics.prom` of the run's folder, replaced after each step.

    Node exporter's textfile collector reads such a file where it is linked to. A list's place is the label `rank` for
    numbers of ranks, else `part`.

    Args:
        folder: The run's.

    Raises:
        ImportError: prometheus-client is missing.
    """

    name = PROMETHEUS
    requires_logging_directory = False

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._client = require("prometheus_client", extra=EXTRA)

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Write a step's numbers."""
        registry = self._client.CollectorRegistry()
        gauges: dict[str, Any] = {}
        for name, value in {"step": step, **values}.items():
            group, *parts = name.split("/")
            metric = "_".join([group, *(part for part in parts if not part.isdigit())])
            metric = re.sub(r"\W", "_", metric)
            labels = {("rank" if group == "ranks" else "part"): parts[-1]} if parts and parts[-1].isdigit() else {}
            if metric not in gauges:
                text = f"{metric.replace('_', ' ')} of the last step"
                gauges[metric] = self._client.Gauge(
                    metric, text, list(labels), namespace="ultralong", subsystem="train", registry=registry
                )
            (gauges[metric].labels(**labels) if labels else gauges[metric]).set(value)
        self._client.write_to_textfile(str(self.path), registry)


def make_trackers(names: Sequence[str], folder: str | os.PathLike[str]) -> list[str | GeneralTracker]:
    """Trackers of accelerate by their names, and this module's own made for a run's folder."""
    return [PrometheusFile(folder) if name == PROMETHEUS else name for name in names]


def check_trackers(names: Sequence[str], available: Sequence[Any] | None) -> None:
    """Refuse trackers that are unknown or, unless `available` is None, not installed.

    Args:
        names: As in a run's config.
        available: accelerate's that are installed.

    Raises:
        ValueError: One is unknown or missing.
        ImportError: prometheus-client is missing.
    """
    others = [name for name in names if name not in ("all", PROMETHEUS)]
    if unknown := [name for name in others if name not in LOGGER_TYPE_TO_CLASS]:
        known = ", ".join([*LOGGER_TYPE_TO_CLASS, PROMETHEUS])
        raise ValueError(f"trackers: {unknown[0]!r} is none of {known}.")
    if available is None:
        return
    installed = [str(name) for name in available]
    if missing := [name for name in others if name not in installed]:
        raise ValueError(f"trackers: {missing[0]} is not installed. Install it, or leave it out of trackers.")
    if PROMETHEUS in names:
        require("prometheus_client", extra=EXTRA)
