"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import ultralong
from ultralong.utils.units import GIB

PACKAGES = (
    "torch",
    "transformers",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "ring-flash-attn",
    "deepspeed",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "triton",
)


def machine_facts() -> dict[str, Any]:
    """Hardware, versions and date, for the head of a result file."""
    versions = {"ultralong": ultralong.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": versions,
        "cpus": os.cpu_count(),
        "device": "cpu",
        "devices": 0,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return facts
