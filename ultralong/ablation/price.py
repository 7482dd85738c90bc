"""What a study will take before it starts: every training run planned once, from the trainer's own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralong.ablation.resolve import base_folder, check, links, run_settings, training_config
from ultralong.ablation.study import Study
from ultralong.evaluation.tasks.groups import SPECIAL
from ultralong.planner import plan
from ultralong.utils.units import GIB

# Rows are not packed yet, and the folder is not there: a plan takes the length that it is given.
NOWHERE = Path("not-made-yet")


def price(study: Study, *, machine: str = "h200", gpus: int | None = None, cost: float | None = None) -> dict[str, Any]:
    """Plan the training of a study; what arms share is counted once.

    Args:
        study: The study.
        machine: As `ultralong.planner.plan` takes it.
        gpus: GPUs of each run; None is as many as share one row.
        cost: Price of one GPU-hour, in any currency.

    Returns:
        `runs`, one an arm, seed and stage: `arm`, `seed`, `to` (window), `row` (tokens), `steps`, `tokens`, `seconds`,
        `gpus`, `gpu_hours`, `gib` (memory of each GPU), `fits`, `shared` (True where an earlier run is the same);
        `gpu_hours` and `cost` over all; `evaluations` (models measured) and `prompt_tokens` (read by the tests of all,
        without needles and perplexity), which are not priced.

    Raises:
        ValueError: The study is wrong, or a run cannot be planned.
    """
    base, seen, rows = check(study), set[str](), list[dict[str, Any]]()
    planned: dict[str, Any] = {}
    for seed in study.seeds:
        for arm, design in study.designs().items():
            for link in links(design, seed, base):
                model = base_folder(design)
                config = training_config(design, link.stage, seed, model, NOWHERE / "rows", NOWHERE / "out")
                # Seeds differ in nothing that takes time.
                shape = str(replace(config, seed=0))
                if shape not in planned:
                    planned[shape] = plan(config, gpus, machine=machine, tokens=link.stage.length)
                made = planned[shape]
                seconds = made.total("step") * config.steps
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "to": link.stage.to,
                        "row": link.stage.length,
                        "steps": config.steps,
                        "tokens": config.steps * config.global_batch_size * link.stage.length,
                        "seconds": round(seconds, 1),
                        "gpus": made.gpus,
                        "gpu_hours": round(seconds * made.gpus / 3600, 4),
                        "gib": round(made.total("gpu") / GIB, 1),
                        "fits": made.fits,
                        "shared": link.trained in seen,
                    }
                )
                seen.add(link.trained)
    hours = sum(row["gpu_hours"] for row in rows if not row["shared"])
    wanted = run_settings(study.base, "model", "texts", "rows")
    tests = [name for name in wanted.tasks if name not in SPECIAL]
    models = 1 + len(study.designs()) * (1 + len(study.seeds))
    return {
        "runs": rows,
        "gpu_hours": round(hours, 3),
        "cost": None if cost is None else round(hours * cost, 2),
        "machine": machine,
        "evaluations": models,
        "prompt_tokens": models * len(tests) * wanted.samples * sum(wanted.lengths),
    }


def price_lines(found: Mapping[str, Any]) -> list[str]:
    """What `price` found, for a terminal."""
    lines = ["arm                     seed     tokens of a row   steps   seconds  GPUs   GiB each"]
    for run in found["runs"]:
        note = "  shared" if run["shared"] else "" if run["fits"] else "  does not fit"
        lines.append(
            f"{run['arm']:22} {run['seed']:5} {run['row']:19,} {run['steps']:7,} {run['seconds']:9,.1f} {run['gpus']:5}"
            f" {run['gib']:10.1f}{note}"
        )
    cost = "" if found["cost"] is None else f", {found['cost']:,.2f} in all"
    lines.append(f"training: {found['gpu_hours']:,.2f} GPU-hours on {found['machine']}{cost}")
    lines.append(
        f"evaluation, not priced: up to {found['evaluations']} models, {found['prompt_tokens']:,} tokens of prompts of "
        "tests, and needles and perplexity where they are asked for"
    )
    return lines
