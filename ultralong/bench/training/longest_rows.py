"""The longest rows that fit a GPU's memory, by the planner: `ultralong bench longest --json FILE`.

Nothing is run: each row is planned, with the memory plan that reaches furthest. What a card does in a second is not
said, only what fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralong.bench.results import all_rows, markdown, write_rows
from ultralong.planner.autotune import longest_row
from ultralong.planner.machine import load_machine
from ultralong.planner.memory import gpu_total, host_memory
from ultralong.planner.planner import planned_workload
from ultralong.planner.workload import Workload
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.utils.settings import to_mapping
from ultralong.utils.units import GIB

ADAPTERS = LoRAConfig(rank=16)
RATES = "h200"  # by which the planner chooses among plans that fit; its memory is not used


def run_of(model: str, adapters: bool, kv_heads: int) -> TrainConfig:
    """One GPU's run with everything on that makes its memory small."""
    return TrainConfig(
        model=model,
        out="run",
        data=(DataSource("rows"),),
        steps=1,
        lora=ADAPTERS if adapters else LoRAConfig(),
        optimizer=OptimizerConfig(state_precision="8bit"),
        parallel=ParallelConfig(fsdp_shard_degree=1, kernel="flash", head_chunks=kv_heads),
        memory=MemoryConfig(activation_checkpointing=True, layer_tile=16384, loss_tile=4096),
    )


def bench_longest(
    models: Sequence[str], cards: Sequence[float], host: float, path: Path | None = None
) -> list[dict[str, Any]]:
    """Plan the longest row of each model for each size of memory, all parameters trained and adapters only.

    Args:
        models: As `ultralong plan` takes them.
        cards: GiB of a GPU.
        host: GiB of host memory for the process.
        path: JSON file, written after every model.

    Returns:
        Rows with `planned_tokens` (0 where no row fits), `planned_total_gpu_gib`, `planned_host_gib` while training,
        and `memory`, the settings.

    Raises:
        ValueError: The planner does not know a model.
    """
    rows: list[dict[str, Any]] = []
    for model in models:
        for adapters in (False, True):
            workload = planned_workload(run_of(model, adapters, 1), 1, load_machine(RATES), 65536)
            config = run_of(model, adapters, workload.shape.kv_heads)
            workload = planned_workload(config, 1, load_machine(RATES), 65536)
            for card in cards:
                found = longest_row(workload, card * GIB, host * GIB)
                rows.append({**_case(config, workload, card, host), **_planned(found)})
        if path is not None:
            write_rows(path, rows, rule="planned, not measured; the card's own memory is all there")
    return rows


def _case(config: TrainConfig, workload: Workload, card: float, host: float) -> dict[str, Any]:
    return {
        "model": Path(config.model).name,
        "parameters": workload.shape.parameters,
        "trained": f"LoRA, rank {config.lora.rank}" if config.lora.on else "all, AdamW in 8 bits",
        "gpus": 1,
        "gpu_memory_gib": card,
        "host_memory_gib": host,
        "kernel": config.parallel.kernel,
    }


def _planned(found: Workload | None) -> dict[str, Any]:
    if found is None:
        return {"planned_tokens": 0}
    pinned = [line.value for line in host_memory(found) if not line.name.startswith("copies of model")]
    return {
        "planned_tokens": found.tokens,
        "planned_total_gpu_gib": round(gpu_total(found) / GIB, 2),
        "planned_host_gib": round(sum(pinned) / GIB, 2),
        "memory": to_mapping(found.config.memory),
    }


def longest_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Longest planned rows by model, what is trained and the GPU's memory.

    Args:
        recorded: What `bench_longest` wrote, one or more files.

    Returns:
        Lines of a Markdown table.
    """
    rows = all_rows(recorded)
    cards = sorted({row["gpu_memory_gib"] for row in rows})
    lines = []
    for model, trained in dict.fromkeys((row["model"], row["trained"]) for row in rows):
        tokens = {
            r["gpu_memory_gib"]: r["planned_tokens"] for r in rows if (r["model"], r["trained"]) == (model, trained)
        }
        lines.append([model, trained, *(f"{tokens[card]:,}" if tokens.get(card) else "none" for card in cards)])
    return markdown(" | ".join(["model", "trained", *(f"{card:g} GiB" for card in cards)]), lines)
