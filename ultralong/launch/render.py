"""From a config and a number of hosts to script files."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import yaml

from ultralong import __version__
from ultralong.launch.image import containerfile
from ultralong.launch.manifests import MANIFEST_FILES, site_facts, write_manifest
from ultralong.training.config import TrainConfig
from ultralong.training.process_checks import process_problem
from ultralong.utils import settings
from ultralong.utils.files import atomic_path, write_text

# What is written for each scheduler; the first file is the one to start.
FILES = {
    "torchrun": ("run.sh", "config.yaml"),
    "slurm": ("submit.sh", "job.sbatch", "run.sh", "config.yaml"),
    "accelerate": ("run.sh", "config.yaml", "accelerate.yaml"),
}
SCHEDULERS = tuple(FILES)
FILES |= {target: (file, "run.sh", "config.yaml", "Containerfile") for target, file in MANIFEST_FILES.items()}
RESUME = "After a stop, start it again: it resumes from the newest checkpoint."


def launch(
    config: TrainConfig,
    nodes: int,
    gpus_per_node: int,
    scheduler: str,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    site: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the scripts that start a run on several hosts, and the one config file that they all read.

    Args:
        config: The run. Relative paths in it are relative to the folder that the site names in WORKDIR. With
            `save_every` 0 the scripts' config has auto (see `saving`).
        nodes: Hosts.
        gpus_per_node: Processes a host, one a GPU.
        scheduler: "torchrun" (run.sh on each host), "slurm" (submit.sh, which submits job.sbatch, which starts run.sh
            on each host), "accelerate" (run.sh on each host, through accelerate's launcher), or "skypilot", "trainjob"
            or "jobset" (a manifest that starts run.sh in a container on each host).
        out: Folder for the scripts; it is made when missing.
        overwrite: Replace files of the same names that are there.
        site: What a manifest has to know of the site, such as {"image": "..."}; see `manifests.FACTS`. Scripts take
            theirs from variables when they are started.

    Returns:
        The files that were written; the first is the one to start.

    Raises:
        ValueError: The scheduler is unknown, a number is not positive, the processes do not fit the config, facts of
            the site are missing, or files would be replaced.
    """
    if scheduler not in FILES:
        raise ValueError(f"scheduler {scheduler!r} is unknown. Use one of: {', '.join(FILES)}.")
    if nodes < 1 or gpus_per_node < 1:
        raise ValueError(f"nodes and gpus_per_node must be 1 or more, found {nodes} and {gpus_per_node}.")
    if problem := process_problem(config, nodes * gpus_per_node):
        raise ValueError(problem)
    facts = _facts(scheduler, nodes, site or {})
    if scheduler in MANIFEST_FILES:
        rows = {f"data[{number}].rows": source.rows for number, source in enumerate(config.data)}
        _check_inside(config.out, {"model": config.model, **rows}, facts["workdir"])
    folder, config = Path(out), saving(config)
    there = [name for name in FILES[scheduler] if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{folder} holds {', '.join(there)} already, and a job may be using them. Give another --out, or "
            "--overwrite to replace them."
        )
    values: dict[str, int | str] = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "run_name": run_name(config),
        "run_folder": config.out,
    }
    what = f"{run_name(config)}: {config.steps:,} steps on {nodes} host{'s' * (nodes > 1)} of {gpus_per_node} GPUs."
    settings.save(config, folder / "config.yaml", "Every setting of the run that the scripts beside this file start.")
    if scheduler == "accelerate":
        write_text(folder / "accelerate.yaml", _accelerate(nodes, gpus_per_node))
    if scheduler == "slurm":
        _write_job(folder, what, values)
    starter = "accelerate" if scheduler == "accelerate" else "torchrun"
    _write(
        folder / "run.sh",
        (),
        _where(scheduler),
        what,
        {name: value for name, value in values.items() if name != "run_name" or starter == "torchrun"},
        ("facts", "site", "settings", starter, "newest", "loop"),
    )
    if scheduler in MANIFEST_FILES:
        write_manifest(scheduler, folder, run_name(config), what, (nodes, gpus_per_node), facts)
        write_text(folder / "Containerfile", containerfile(config))
    return [folder / name for name in FILES[scheduler]]


def saving(config: TrainConfig) -> TrainConfig:
    """The config with checkpoints at intervals: a run that a scheduler may stop must not start anew each time.

    Where `save_every` is 0 it becomes auto; a run that should save only at its end sets it to its number of steps.
    """
    if config.save_every:
        return config
    return replace(config, save_every="auto")


def _write_job(folder: Path, what: str, values: Mapping[str, int | str]) -> None:
    """The two scripts of Slurm: what is submitted, and what submits it."""
    nodes, gpus_per_node = int(values["nodes"]), int(values["gpus_per_node"])
    _write(
        folder / "job.sbatch",
        _directives(nodes, gpus_per_node),
        "Submit it with submit.sh.",
        what,
        {name: values[name] for name in ("run_name", "run_folder")},
        ("newest", "job"),
    )
    _write(
        folder / "submit.sh",
        (),
        "Run it once, on a host that has sbatch: ./submit.sh [--dry-run]",
        what,
        {name: values[name] for name in ("nodes", "gpus_per_node", "run_name")},
        ("facts", "submit"),
    )


def run_name(config: TrainConfig) -> str:
    """The run's name for job lists and log folders: its folder's, in characters that every scheduler takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.out).name).strip("-.")[:64] or "run"


def _facts(scheduler: str, nodes: int, site: Mapping[str, str]) -> dict[str, str]:
    if scheduler in MANIFEST_FILES:
        return site_facts(scheduler, nodes, site)
    if site:
        raise ValueError(
            f"{scheduler} takes no --site: its scripts name the variables that they need. Manifests take it: "
            f"{', '.join(MANIFEST_FILES)}."
        )
    return {}


def _check_inside(out: str, others: Mapping[str, str], workdir: str) -> None:
    """Refuse a run's folder beside the volume, which is lost with the container; warn of other paths there.

    Args:
        out: The run's folder.
        others: What the run reads, by the config's keys: an image may hold it.
        workdir: Where the volume is mounted.

    Raises:
        ValueError: The run's folder is outside of it.
    """
    place = os.path.normpath(workdir)

    def outside(path: str) -> bool:
        return os.path.commonpath([place, os.path.normpath(os.path.join(place, path))]) != place

    if outside(out):
        raise ValueError(
            f"out ({out}) is not inside workdir={workdir}, where the volume is mounted: checkpoints and model would be "
            "lost with the container. Give a path inside it, such as --set out=runs/NAME, or mount the volume above it."
        )
    if beside := [f"{key} ({path})" for key, path in others.items() if outside(path)]:
        warnings.warn(
            f"{', '.join(beside)}: not inside workdir={workdir}, where the volume is mounted, so the image has to hold "
            "it.",
            stacklevel=4,
        )


def _piece(name: str) -> str:
    return resources.files("ultralong.launch").joinpath("pieces", name).read_text(encoding="utf-8")


def _where(scheduler: str) -> str:
    if scheduler in MANIFEST_FILES:
        return f"Started in a container on each host, see {MANIFEST_FILES[scheduler]}."
    if scheduler == "slurm":
        return "Started by job.sbatch, once on each host."
    return "Start it on each host: ./run.sh [--dry-run]"


def _write(
    path: Path,
    directives: tuple[str, ...],
    how: str,
    what: str,
    values: Mapping[str, int | str],
    pieces: tuple[str, ...],
) -> None:
    """Write an executable script: header, values, pieces."""
    header = [
        "#!/usr/bin/env bash",
        *directives,
        f"# {what}",
        f"# {how}",
        f"# {RESUME}",
        f"# Rendered by ultralong {__version__}; to change it, render it again (ultralong launch).",
        # A quoted value may hold a dollar sign, and a function may be called by a trap only; both are meant.
        "# shellcheck disable=SC2016,SC2329",
        "set -euo pipefail",
        "",
        "# ---- Values of the run.",
    ]
    assigned = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    body = [_piece(f"{name}.sh").strip("\n") for name in pieces]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*header, *assigned]) + "\n\n" + "\n\n".join(body) + "\n", encoding="utf-8")
    # Who may read a script may run it.
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)


def _directives(nodes: int, gpus_per_node: int) -> tuple[str, ...]:
    """The job's shape: numbers only, as nothing inside a directive is quoted."""
    return (
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --gpus-per-node={gpus_per_node}",
        "#SBATCH --ntasks-per-node=1",
        "# Whole hosts: what is offloaded fills their memory, and a neighbour would share the network.",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "# After a lost host or a preemption back into the queue, with one log for all attempts.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@300",
        "#",
    )


def _accelerate(nodes: int, gpus_per_node: int) -> str:
    """What accelerate reads: only the shape of the job, as everything else is in config.yaml."""
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_machines": nodes,
        "num_processes": nodes * gpus_per_node,
        "machine_rank": 0,
        "rdzv_backend": "c10d",
        "same_network": False,
        "mixed_precision": "no",
        "use_cpu": False,
    }
    note = "# Only the shape of the job. Precision and all else is in config.yaml, which the trainer reads.\n"
    return note + yaml.safe_dump(content, sort_keys=False)
