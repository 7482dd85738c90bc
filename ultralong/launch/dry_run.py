"""What can be known without a GPU before hosts are allocated: config, mesh, model, rows, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultralong.training.config import STATE_BYTES, TrainConfig
from ultralong.training.preflight import Finding, preflight
from ultralong.training.run_folder import RunFolder
from ultralong.training.save_pace import steps_between
from ultralong.training.sharing import kept
from ultralong.utils.files import read_json_object
from ultralong.utils.units import GIB

# The top package of each kernel that has one of its own, and how it comes here.
KERNEL_PACKAGES = {
    "flash4": ("flash_attn", "pip install 'ultralong[flash4]'"),
    "flash3": ("flash_attn_interface", "build it from the folder hopper of the flash-attention repository"),
    "flash2": ("flash_attn", "make flash, in a clone"),
}


def check(config: TrainConfig, nodes: int, gpus_per_node: int) -> list[Finding]:
    """Check a run against the files it names and the processes it will have. Nothing is loaded or written.

    Args:
        config: The run, its relative paths relative to the current folder.
        nodes: Hosts.
        gpus_per_node: Processes a host.

    Returns:
        One finding a check, in the order in which a run would meet them.
    """
    config, found = _shared(config, nodes * gpus_per_node, gpus_per_node)
    found += preflight(config, nodes * gpus_per_node, resume=True)
    own: list[tuple[str, Callable[[], str]]] = [
        ("weights", lambda: _weights(config)),
        ("disk", lambda: _disk(config)),
        ("resume", lambda: _resume(config)),
    ]
    if config.parallel.kernel in KERNEL_PACKAGES:
        own.append(("kernel", lambda: _kernel(config.parallel.kernel)))
    for name, run in own:
        try:
            found.append(Finding(name, True, run()))
        except (ValueError, OSError) as error:
            found.append(Finding(name, False, str(error)))
    return found


def _shared(config: TrainConfig, processes: int, host_gpus: int) -> tuple[TrainConfig, list[Finding]]:
    """The config with how rows are shared decided, where that is auto, and what was decided.

    Where every way is refused, that of the one with the least wrong.
    """
    if not config.parallel.undecided:
        return config, []
    folder = RunFolder(Path(config.out))
    try:
        decision = kept(folder, config, processes)
        if decision is None:
            from ultralong.planner import decide_sharing  # takes seconds to load, which other configs need not wait for

            decision = decide_sharing(config, processes, host_gpus=host_gpus)
    except ValueError as error:
        ways = [replace(config, parallel=way) for way in config.parallel.choices(processes)]
        least = min(ways, key=lambda way: sum(not each.good for each in preflight(way, processes, resume=True)))
        return least, [Finding("sharing", False, " ".join(str(error).split()))]
    return decision.applied(config), [Finding("sharing", True, decision.reason)]


def _kernel(name: str) -> str:
    """Whether a kernel's package is installed; it is not imported, as most need a GPU for that."""
    package, cure = KERNEL_PACKAGES[name]
    if find_spec(package) is None:
        raise ValueError(f"parallel.kernel is {name}, whose package is not installed for this interpreter: {cure}.")
    return f"{name} is installed"


def _weights(config: TrainConfig) -> str:
    folder = Path(config.model)
    _model_config(folder)
    weights = _weight_files(folder)
    if missing := [path.name for path in weights if not path.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its {len(weights)} weight files, such as {missing[0]}. "
            "Copy the model again."
        )
    return f"{sum(path.stat().st_size for path in weights) / GIB:.1f} GiB in {len(weights)} files"


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a model folder here (no config.json). Hosts of a cluster often have no "
            "network: download the model into a folder that all of them see."
        )
    return read_json_object(path)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json_object(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def _disk(config: TrainConfig) -> str:
    if not (Path(config.model) / "config.json").is_file():
        raise ValueError("what checkpoints take is not known without the model.")
    weights = _weight_files(Path(config.model))
    stored = _bytes_a_weight(_model_config(Path(config.model)))
    parameters = sum(path.stat().st_size for path in weights if path.is_file()) / stored
    # One more than is kept, as the newest is whole before the oldest goes; and the exported model.
    needed = (config.keep + 1) * parameters * (4 + STATE_BYTES[config.optimizer.state_precision]) + parameters * stored
    there = Path(config.out).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{config.out} needs {needed / GIB:.1f} GiB for {config.keep} checkpoints, one being written, "
            f"and the model; {free / GIB:.1f} GiB are free. Free some, set `keep` lower, or choose "
            "another `out`."
        )
    return f"{needed / GIB:.1f} GiB needed for checkpoints and the model, {free / GIB:.1f} GiB free"


def _bytes_a_weight(settings: dict[str, Any]) -> int:
    return 4 if "float32" in str(settings.get("dtype") or settings.get("torch_dtype") or "float32") else 2


def _resume(config: TrainConfig) -> str:
    if not config.save_every:
        return "save_every is 0: a run that is stopped starts anew; set save_every=auto to lose fewer steps"
    every = steps_between(config)
    saves, more = max(1, config.steps // every), " or more" if config.save_every == "auto" else ""
    return f"a stop loses at most {every} of {config.steps} steps ({saves} checkpoints{more})"
