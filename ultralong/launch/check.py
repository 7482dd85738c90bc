"""What can be known without a GPU before hosts are allocated: config, mesh, model, rows, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.attention.ulysses import head_split
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.training.config import TrainConfig
from ultralong.utils.files import read_json
from ultralong.utils.units import GIB

# A checkpoint holds what AdamW needs: float32 parameters and two float32 states.
CHECKPOINT_BYTES_A_PARAMETER = 12


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: What was checked.
        good: False stops the launch.
        text: What was found and, where it is wrong, what to do.
    """

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{'ok   ' if self.good else 'WRONG'} {self.name}: {self.text}"


def check(config: TrainConfig, nodes: int, gpus_per_node: int) -> list[Finding]:
    """Check a run against the files it names and the processes it will have. Nothing is loaded or written.

    Args:
        config: The run, its relative paths relative to the current folder.
        nodes: Hosts.
        gpus_per_node: Processes a host.

    Returns:
        One finding a check, in the order in which a run would meet them.
    """
    world = nodes * gpus_per_node
    checks: list[tuple[str, Callable[[], str]]] = [
        ("mesh", lambda: _mesh(config, world)),
        ("model", lambda: _model(config)),
        ("rows", lambda: _rows(config)),
        ("sequence", lambda: _sequence(config)),
        ("disk", lambda: _disk(config)),
        ("resume", lambda: _resume(config)),
    ]
    findings = []
    for name, run in checks:
        try:
            findings.append(Finding(name, True, run()))
        except (ValueError, OSError) as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def mesh_problem(config: TrainConfig, world: int) -> str | None:
    """Why `world` processes cannot run this config and which settings would, or None.

    The trainer refuses the same, but on allocated hosts.
    """
    size, rows, micro = config.parallel.context_parallel_size, config.global_batch_size, config.micro_batch_size
    degree = config.parallel.fsdp_shard_degree
    if world % size:
        divisor = max(d for d in range(1, size + 1) if world % d == 0)
        return (
            f"{world} processes are not a multiple of parallel.context_parallel_size ({size}). Change the number of "
            f"hosts, or --set parallel.context_parallel_size={divisor}, which divides {world}."
        )
    if degree is not None and world % degree:
        divisor = max(d for d in range(1, degree + 1) if world % d == 0)
        return (
            f"{world} processes are not a multiple of parallel.fsdp_shard_degree ({degree}). Change the number of "
            f"hosts, or --set parallel.fsdp_shard_degree={divisor}, which divides {world}."
        )
    groups = world // size
    if rows % (groups * micro):
        larger = [d for d in range(size, world + 1, size) if world % d == 0 and rows % (world // d * micro) == 0]
        other = f", or --set parallel.context_parallel_size={larger[0]}: more GPUs share a row" if larger else ""
        return (
            f"global_batch_size ({rows}) is not a multiple of {groups} groups of processes x micro_batch_size "
            f"({micro}). --set global_batch_size={-(-rows // (groups * micro)) * groups * micro}, a multiple of "
            f"{groups * micro}{other}."
        )
    return None


def _mesh(config: TrainConfig, world: int) -> str:
    if problem := mesh_problem(config, world):
        raise ValueError(problem)
    groups = world // config.parallel.context_parallel_size
    size = config.parallel.context_parallel_size
    return (
        f"{world} processes: {groups} group{'s' * (groups > 1)} of {size} that share a row, "
        f"{config.global_batch_size // groups} rows a step each"
    )


def _model(config: TrainConfig) -> str:
    folder = Path(config.model)
    settings = _model_config(folder)
    weights = _weight_files(folder)
    if missing := [path.name for path in weights if not path.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its {len(weights)} weight files, such as {missing[0]}. "
            "Copy the model again."
        )
    size = sum(path.stat().st_size for path in weights)
    kind = settings.get("model_type", "unknown type")
    return f"{kind}, {size / GIB:.1f} GiB of weights, window {_window(settings):,}"


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a model folder here (no config.json). Hosts of a cluster often have no "
            "network: download the model into a folder that all of them see."
        )
    return read_json(path)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def _window(settings: dict[str, Any]) -> int:
    return int(settings.get("text_config", settings).get("max_position_embeddings", 0))


def _rows(config: TrainConfig) -> str:
    folders = [PackedRows(source.rows) for source in config.data]
    lengths = sorted({folder.length for folder in folders})
    if len(lengths) > 1:
        raise ValueError(f"the folders of rows have rows of {lengths} tokens; all rows of a run have one length.")
    if config.length not in (None, lengths[0]):
        raise ValueError(
            f"the config says length: {config.length:,}, the rows have {lengths[0]:,} tokens: pack rows of that "
            f"length, or set length={lengths[0]}."
        )
    window = _window(_model_config(Path(config.model)))
    restart = folders[0].manifest.get("restart_positions", False)
    if lengths[0] > window > 0 and not restart:
        raise ValueError(
            f"rows have {lengths[0]:,} tokens and the model's window is {window:,}. Extend the model "
            f"first: ultralong extend {config.model} --to {lengths[0]} --out NEW"
        )
    needed, there = config.steps * config.global_batch_size, sum(len(folder) for folder in folders)
    passes = needed / there
    return f"{there:,} rows of {lengths[0]:,} tokens; the run reads {needed:,} ({passes:.2f} passes)"


def _sequence(config: TrainConfig) -> str:
    ranks, scheme = config.parallel.context_parallel_size, config.parallel.scheme
    settings = _model_config(Path(config.model))
    settings = settings.get("text_config", settings)
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    if ranks == 1 or scheme not in ("auto", "ulysses"):
        return f"{ranks} process{'es' * (ranks > 1)} a row, scheme {scheme}"
    try:
        head_split(heads, kv_heads, ranks)
    except ValueError:
        if scheme == "ulysses":
            raise
        return f"{ranks} processes a row, scheme gathered: {heads} and {kv_heads} heads do not split over them"
    return f"{ranks} processes a row, scheme ulysses: {heads} query and {kv_heads} kv heads split over them"


def _disk(config: TrainConfig) -> str:
    weights = _weight_files(Path(config.model))
    stored = _bytes_a_weight(_model_config(Path(config.model)))
    parameters = sum(path.stat().st_size for path in weights if path.is_file()) / stored
    # One more than is kept, as the newest is whole before the oldest goes; and the exported model.
    needed = (config.keep + 1) * parameters * CHECKPOINT_BYTES_A_PARAMETER + parameters * stored
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
        return "save_every is 0: a run that is stopped starts anew; set save_every to lose fewer steps"
    saves = max(1, config.steps // config.save_every)
    return f"a stop loses at most {config.save_every} of {config.steps} steps ({saves} checkpoints)"
