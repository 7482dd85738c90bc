"""Time and memory of training steps on this machine: `ultralong bench train MODEL --lengths N --json FILE`.

Each case is a real run of the trainer on a model with random weights and rows of random text, in processes of its own,
so that one that runs out of memory does not affect the next. Steps on a short row, which compile, fill caches and make
the optimizer's states, come before the measured ones, and as many over the measured rows as asked. Useful work is
causal work without recomputation (`ultralong.planner.shapes.Shape.model_flops`), against the 989 TF/s that the
datasheet of H100 and H200 gives for bfloat16. Beside what is measured stands what `ultralong plan` says of the same
config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from ultralong.bench.timing import cut_config
from ultralong.bench.training.case import RowCount, TrainingCase, parse_mix
from ultralong.bench.training.mix import kernel_seconds, seed_of, useful_flops
from ultralong.bench.training.ranks import start_ranks
from ultralong.bench.training.work import WARM, prepare_training
from ultralong.planner import plan
from ultralong.planner.machine import load_machine
from ultralong.planner.shapes import Shape, check_countable, planned_model, shape_of
from ultralong.planner.sharing.priced import Asked, one_row_passes
from ultralong.planner.trained import planned_parameters
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.throughput import DATASHEET
from ultralong.utils import settings
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, read_jsonl
from ultralong.utils.processes import start_method
from ultralong.utils.units import GIB

DATASHEET_FLOPS = DATASHEET["H200"]
SHOWN = 40  # kernels of a profile that a row keeps
# Parts of kernels' names; what comes first counts, as attention is made of products too.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "exchange between GPUs": ("nccl",),
    "copies": ("memcpy", "memset"),
    "matrix products": ("gemm", "nvjet", "cublas", "cutlass", "::mm", "::addmm", "::bmm"),
}


def measure_training(case: TrainingCase, machine: str, folder: Path | None = None) -> dict[str, Any]:
    """Time and memory of a case's training steps, beside the plan's.

    Args:
        case: What to train.
        machine: The planner's machine.
        folder: Where models and rows are kept for the next case; by default they are made anew and removed.

    Returns:
        A row with `model`, `parameters`, `tokens`, `gpus`, `gpu`, `seconds_per_step` (the median),
        `tokens_per_second_per_gpu`, `mfu_causal`, `peak_gpu_gib`, `peak_host_gib`, the planner's of the same (of layers
        that it does not count, why not: `not_planned`), `memory`
        (what waited where), `versions` and `date`; or, when the run stopped, `note` with its message, which of a run
        that had taken and recorded every step stands under `ended` beside what it measured. With `profile`
        also `kernels`, what they took on the first GPU in one more step, `kinds`, the same by kind, and
        `profiled_seconds` and `idle_seconds`, that step and what the GPU did nothing of it.
    """
    facts = facts_beside()
    shape = shape_of(case_config(case))
    if case.lora.on:  # a frozen parameter takes fewer FLOP
        counted = planned_parameters(case_config(case), shape, case.lora, outside=0)
        shape = replace(shape, multiplied=round(counted.multiplied))
    row = {
        "model": case.name,
        "parameters": shape.parameters,
        "tokens": sum(part.tokens * part.rows for part in parse_mix(case.mix)) or case.tokens,
        **({"documents": len(case.edges(case.tokens)) - 1} if case.edges(case.tokens) else {}),
        **({"mix": " ".join(case.mix), "sharing": case.sharing, "degree": case.shared_by} if case.mix else {}),
        "gpus": case.gpus,
        "gpu": facts["device"],
        "date": facts["date"],
        "versions": facts["packages"],
    }
    with kept(folder) as place:
        mix = parse_mix(case.mix) or (RowCount(case.tokens, 1),)
        made = prepare_training(
            place, case.model, case.layers, [part.tokens for part in mix], bool(case.mix), case.edges
        )
        with tempfile.TemporaryDirectory(dir=place) as run:
            config = train_config(case, made, Path(run), mix)
            config = replace(config, memory=_fitted(config, case, machine)) if case.fit else config
            settings.save(config, Path(run) / "config.yaml")
            row |= {
                "sharded": case.sharded,
                "state_precision": case.state_precision,
                **({"lora": str(case.lora)} if case.lora.on else {}),
                "kernel": case.kernel,
                "head_chunks": case.head_chunks,
                "memory": settings.to_mapping(config.memory),
                **({"capped_gpu_gib": case.gpu_memory} if case.capped else {}),
            }
            with ThreadPoolExecutor(1) as beside:
                running = beside.submit(_run, case, Path(run), made, shape)
                row |= _planned(config, case, machine, shape)
                row |= running.result()
                if case.mix and "note" not in row:
                    least = kernel_seconds(shape, load_machine(machine), case.kernel, mix, case.gpus)
                    row |= {"kernel_seconds": round(least, 4), "of_kernel": round(least / row["seconds_per_step"], 4)}
                return row


def facts_beside() -> dict[str, Any]:
    """Facts of the machine, found by another process: this one must hold no GPU memory beside the run."""
    with ProcessPoolExecutor(1, mp_context=get_context(start_method())) as other:
        return other.submit(machine_facts).result()


def case_config(case: TrainingCase) -> Any:
    """The config of a case's model."""
    return cut_config(case.model, case.layers)[0]


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """A folder that stays, or one that is removed afterwards."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def train_config(case: TrainingCase, made: dict[str, str], run: Path, mix: tuple[RowCount, ...]) -> TrainConfig:
    """The run that measures a case, in a folder of its own."""
    return TrainConfig(
        model=made["model"],
        out=str(run / "run"),
        data=tuple(DataSource(made[str(part.tokens)], part.rows) for part in mix),
        steps=case.steps,
        seed=seed_of(mix, case.steps),
        global_batch_size=sum(part.rows for part in mix),
        optimizer=OptimizerConfig(state_precision=case.state_precision),
        memory=case.memory,
        lora=case.lora,
        parallel=ParallelConfig(
            context_parallel_size=case.shared_by,
            dynamic_context_parallel=bool(case.mix),
            max_tokens_per_rank=case.max_tokens_per_rank,
            fsdp_shard_degree=case.gpus if case.sharded else None,
            kernel=case.kernel,
            head_chunks=case.head_chunks,
        ),
    )


def _fitted(config: TrainConfig, case: TrainingCase, machine: str) -> MemoryConfig:
    """What the planner chooses."""
    said = plan(config, case.gpus, machine=machine, fit=True, gpu_memory=case.gpu_memory, host_memory=case.host_memory)
    return settings.from_mapping(MemoryConfig, said.memory)


def _planned(config: TrainConfig, case: TrainingCase, machine: str, shape: Shape) -> dict[str, Any]:
    """What the plan says of the run, under the names of what is measured; why it says nothing, of other layers."""
    try:
        check_countable(case_config(case))
    except ValueError as error:
        return {"not_planned": str(error)}
    if case.sharing == "fixed":  # a plan is of a run, and no run takes mixed rows one by one
        rates, (model, _) = load_machine(machine), planned_model(config.model, config.base_model)
        price = one_row_passes(Asked(config, case.gpus, model, shape_of(model), rates, rates.memory))
        flops = useful_flops(shape, price.step_tokens, price.step_pairs)
        return {
            "planned_seconds_per_step": round(price.seconds, 4),
            "planned_mfu_causal": round(flops / price.seconds / case.gpus / rates.peak, 4),
            "planned_peak_gpu_gib": round(price.tensor_bytes / GIB, 3),
            "planned_total_gpu_gib": round(price.gpu_bytes / GIB, 3),
        }
    said = plan(config, case.gpus, machine=machine, gpu_memory=case.gpu_memory).to_dict()
    # Nothing is saved here, which is what would take the rest of the host's memory.
    saving = sum(line["value"] for line in said["lines"] if line["name"].startswith("copies of model and states"))
    said["planned_peak_host_gib"] = round(said["planned_peak_host_gib"] - saving / GIB, 3)
    return {key: value for key, value in said.items() if key.startswith("planned_") and key != "planned_longest_row"}


def _run(case: TrainingCase, run: Path, made: dict[str, str], shape: Shape) -> dict[str, Any]:
    """Start the processes, wait, and read what they left."""
    words = [*(["profile"] if case.profile else []), *(["one-row-passes"] if case.sharing == "fixed" else [])]
    words += [f"warm={case.warming}", *([f"cap={case.gpu_memory}"] if case.capped else [])]
    failed = start_ranks(case.gpus, "ultralong.bench.training.work", str(run), made["short"], *words)
    log = read_jsonl(run / "log.jsonl") if (run / "log.jsonl").exists() else []
    ranks = [read_json(path) for path in sorted(run.glob("rank-*.json"))]
    profiled = not case.profile or (run / "kernels.json").exists()
    # Giving back 100 GiB of host memory takes seconds: a process that is stopped in them has measured all the same.
    if failed and not (profiled and len(log) == case.steps and len(ranks) == case.gpus):
        return failed
    seconds = median(record["seconds"] for record in log)
    profile = read_json(run / "kernels.json") if case.profile else {}
    kernels = profile.pop("kernels", [])
    tokens, flops = log[-1]["step_tokens"], useful_flops(shape, log[-1]["step_tokens"], log[-1]["pairs"])
    return {
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second_per_gpu": round(tokens / seconds / case.gpus, 1),
        "mfu_causal": round(flops / seconds / case.gpus / DATASHEET_FLOPS, 4),
        **{key: round(max(rank[key] for rank in ranks) / GIB, 3) for key in ranks[0]},
        "steps": [record["seconds"] for record in log],
        **({"ended": failed["note"]} if failed else {}),
        "loss": log[-1]["loss"],
        "grad_norm": log[-1]["grad_norm"],
        "warm_up_tokens": WARM,
        **({"warm_steps": case.warming} if case.warming else {}),
        **{key: log[-1][key] for key in ("passes", "rows_by_degree") if key in log[-1]},
        **{key: round(seconds, 4) for key, seconds in profile.items()},
        **({"kinds": by_kind(kernels), "kernels": kernels[:SHOWN]} if case.profile else {}),
    }


def by_kind(kernels: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of kernels by what they are for, told from their names; the most first."""
    found: dict[str, float] = {}
    for kernel in kernels:
        name = kernel["name"].lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "all else")
        found[kind] = found.get(kind, 0.0) + kernel["seconds"]
    return {kind: round(took, 4) for kind, took in sorted(found.items(), key=lambda each: -each[1])}
