"""A peer's row: the same model on the same rows in processes of their own, one peer after the other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ultralong.bench.training.case import TrainingCase
from ultralong.bench.training.measure import DATASHEET_FLOPS, case_config, facts_beside
from ultralong.bench.training.ranks import start_ranks
from ultralong.bench.training.work import WARM, prepare_training
from ultralong.planner.shapes import shape_of
from ultralong.utils.files import read_json
from ultralong.utils.units import GIB

PEERS = {  # packages of each beyond those that this project needs itself
    "torch-cp-flash": (),
    "torch-cp-cudnn": (),
    "trl-sft-cp": ("trl", "datasets"),
    "deepspeed-alst": ("deepspeed",),
    "deepspeed-alst-offload": ("deepspeed",),
    "deepspeed-alst-offload-all": ("deepspeed",),
    "torchtitan-cp": ("torchtitan",),
}
OURS = "ours"
# What these compile, or pin in host memory, is for one length of rows: what comes before is a step on a whole row.
FOR_ONE_LENGTH = ("deepspeed-alst-offload", "deepspeed-alst-offload-all", "torchtitan-cp")


def wanted_peers(only: Sequence[str]) -> tuple[str, ...]:
    """What to measure: ours and all peers, or those named.

    Raises:
        ValueError: A name is none of them.
    """
    names = (OURS, *PEERS)
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only names what to measure, of {', '.join(names)}; found {', '.join(unknown)}.")
    return tuple(name for name in names if name in only) if only else names


def measure_peer(name: str, case: TrainingCase, folder: Path, limit: float | None = None) -> dict[str, Any]:
    """A peer's row, like `ultralong.bench.training.measure.measure_training`'s.

    As before the trainer's own steps, two on a short row that do not count come first, and the case's `warm_steps`
    over its rows; at least one of these, and no short ones, for the peers of `FOR_ONE_LENGTH`.

    Args:
        name: One of `PEERS`.
        case: The model, its depth, the row's tokens, the GPUs, two or more, and the measured steps.
        folder: Where models and rows are kept.
        limit: Seconds after which the peer is stopped.

    Returns:
        The row; of a peer that is not installed, failed, or was stopped, `note` says so, `messages` the end of what
        it wrote, and `steps` the seconds of the steps that it had done, those of `warm_up_tokens` first.
    """
    shape = shape_of(case_config(case))
    facts = facts_beside()
    row = {
        "peer": name,
        "model": case.name,
        "parameters": shape.parameters,
        "tokens": case.tokens,
        "gpus": case.gpus,
        "gpu": facts["device"],
        "date": facts["date"],
        "versions": facts["packages"] | _versions("accelerate", *PEERS[name]),
    }
    missing = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
    if missing:  # before rows are made and processes started
        return row | {"note": f"{missing[0]} is not installed (pip install {' '.join(missing)})"}
    made = prepare_training(folder, case.model, case.layers, [])
    lengths = rows_of(name, case)
    row["warm_up_tokens"] = lengths[0]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        words = (name, made["model"], place, ",".join(map(str, lengths)))
        failed = start_ranks(case.gpus, "ultralong.bench.training.peers.work", *words, limit=limit)
        ranks = [read_json(path) for path in sorted(Path(place).glob("rank-*.json"))]
    if ranks:
        row |= {key: round(max(rank["peaks"][key] for rank in ranks) / GIB, 3) for key in ranks[0]["peaks"]}
        row |= {"steps": [round(seconds, 4) for seconds in ranks[0]["times"]], "losses": ranks[0]["losses"]}
    if failed and not (ranks and all(len(rank["times"]) == len(lengths) for rank in ranks)):
        return row | failed  # what failed behind the last step, in ending, changes no measurement
    seconds = max(median(rank["times"][-case.steps :]) for rank in ranks)
    return row | {
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second_per_gpu": round(case.tokens / seconds / case.gpus, 1),
        "mfu_causal": round(shape.model_flops(case.tokens) / seconds / case.gpus / DATASHEET_FLOPS, 4),
    }


def rows_of(name: str, case: TrainingCase) -> tuple[int, ...]:
    """Tokens of each row that a peer trains on; the last `case.steps` count."""
    whole = (case.tokens,) * (max(case.warm_steps, int(name in FOR_ONE_LENGTH)) + case.steps)
    short = min(WARM, case.tokens)
    return whole if name in FOR_ONE_LENGTH else (short, short, *whole)


def _versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
