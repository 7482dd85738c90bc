"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
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
REPORTED = ("ultralong", "torch", "transformers", "accelerate", "numpy", "safetensors")
GIBIBYTE = 1 << 30


def machine_facts() -> dict[str, Any]:
    """Hardware, versions and date, for the head of a result file."""
    versions = {"ultralong": ultralong.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if found := commit():
        versions["ultralong-commit"] = found
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": versions,
        "cpus": os.cpu_count(),
        "processor": _processor(),
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


def commit(folder: Path | None = None) -> str:
    """The commit of a checkout, 12 digits, with -dirty where files differ from it; empty where there is none.

    Args:
        folder: The checkout; by default the one that this package is imported from.
    """
    folder = Path(ultralong.__file__).parents[1] if folder is None else folder
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():  # an installed package, perhaps inside another project's checkout
        return ""
    words = [git, "-C", str(folder), "describe", "--always", "--exclude", "*", "--abbrev=12", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_environment() -> dict[str, str]:
    """Date, machine and versions, as every measured number must carry them."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
    }
    memory = _memory_bytes()
    if memory:
        facts["memory"] = f"{memory / GIBIBYTE:.0f} GiB"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = f"{device.name}, {device.total_memory / GIBIBYTE:.0f} GiB"
    return facts | {name: found for name in REPORTED if (found := _version(name))}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Name of the processor: Linux keeps it in a file, elsewhere the platform knows it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
