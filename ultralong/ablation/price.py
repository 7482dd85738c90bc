"""What a study will take before it starts: every training run planned once, from the trainer's own code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralong.ablation.configs import run_settings, sft_config, training_config
from ultralong.ablation.design import Design
from ultralong.ablation.resolve import base_folder, check, final_key, links, measured_key, tuned_key
from ultralong.ablation.study import Study
from ultralong.ablation.train_run import is_trained
from ultralong.evaluation.tasks.groups import SPECIAL
from ultralong.planner import plan
from ultralong.training.config import TrainConfig
from ultralong.utils.units import GIB

# Rows are not packed yet, and the folder is not there: a plan takes the length that it is given.
NOWHERE = Path("not-made-yet")


def price(
    study: Study,
    *,
    machine: str = "h200",
    gpus: int | None = None,
    cost: float | None = None,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Plan the training of a study; what arms share is counted once.

    Rows are not packed yet, so every token is planned to see all before it in its row: those of masked documents and of
    SFT's conversations, which don't see each other, take less.

    Args:
        study: The study.
        machine: As `ultralong.planner.plan` takes it.
        gpus: GPUs of each run; None is as many as share one row.
        cost: Price of one GPU-hour, in any currency.
        out: Folder of the study, where it may have begun: what is done there costs nothing.

    Returns:
        `runs`, one an arm, seed and stage, and one for its SFT: `arm`, `seed`, `training` (pretraining or SFT), `to`
        (window), `row` (tokens), `steps`, `tokens`, `seconds`, `gpus`, `gpu_hours`, `gib` (memory of each GPU), `fits`,
        `shared` (True where an earlier run is the same), `done` (True where it is trained or its arm measured);
        `gpu_hours` and `cost` over all; `evaluations` (models measured) and `prompt_tokens` (read by the tests of all,
        without needles and perplexity), which are not priced.

    Raises:
        ValueError: The study is wrong, or a run cannot be planned.
    """
    base, seen, rows = check(study), set[str](), list[dict[str, Any]]()
    planned: dict[str, Any] = {}
    for seed in study.seeds:
        for arm, design in study.designs().items():
            measured = _is_measured(out, design, seed, base)
            for run, to, config in _runs(design, seed, base):
                # Seeds differ in nothing that takes time.
                shape = str(replace(config, seed=0))
                if shape not in planned:
                    planned[shape] = plan(config, gpus, machine=machine, tokens=config.length)
                made = planned[shape]
                seconds = made.total("step") * config.steps
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "training": "SFT" if to is None else "pretraining",
                        "to": design.window if to is None else to,
                        "row": config.length,
                        "steps": config.steps,
                        "tokens": config.steps * config.global_batch_size * (config.length or 0),
                        "seconds": round(seconds, 1),
                        "gpus": made.gpus,
                        "gpu_hours": round(seconds * made.gpus / 3600, 4),
                        "gib": round(made.total("gpu") / GIB, 1),
                        "fits": made.fits,
                        "shared": run in seen,
                        "done": measured or (out is not None and is_trained(Path(out).expanduser() / "runs" / run)),
                    }
                )
                seen.add(run)
    hours = sum(row["gpu_hours"] for row in rows if not row["shared"] and not row["done"])
    wanted = run_settings(study.base, "model", "texts", "rows")
    tests = [name for name in wanted.tasks if name not in SPECIAL]
    models = 1 + len(study.designs()) * (1 + len(study.seeds))
    return {
        "runs": rows,
        "gpu_hours": round(hours, 3),
        "cost": None if cost is None else round(hours * cost, 2),
        "machine": machine,
        "evaluations": models,
        "tests": list(wanted.tasks),
        "prompt_tokens": models * len(tests) * wanted.samples * sum(wanted.lengths),
    }


def _is_measured(out: str | os.PathLike[str] | None, design: Design, seed: int, base: str) -> bool:
    """Whether a study's folder holds the outcomes of an arm and seed; its model may have been deleted since."""
    if out is None:
        return False
    name = measured_key(design, final_key(design, seed, base), base)
    return (Path(out).expanduser() / "shared" / name / "outcomes.json").exists()


def _runs(design: Design, seed: int, base: str) -> Iterator[tuple[str, int | None, TrainConfig]]:
    """Every training of an arm and seed: its key, the window of its stage (None: SFT), its config."""
    model, rows, out = base_folder(design), NOWHERE / "rows", NOWHERE / "out"
    for link in links(design, seed, base):
        if link.trains:
            yield link.trained, link.stage.to, training_config(design, link.stage, seed, model, rows, out)
    if design.sft is not None:
        yield tuned_key(design, design.sft, seed, base), None, sft_config(design.sft, seed, model, rows, out)


def price_lines(found: Mapping[str, Any]) -> list[str]:
    """What `price` found, for a terminal."""
    lines = ["arm                     seed     tokens of a row   steps   seconds  GPUs   GiB each"]
    for run in found["runs"]:
        notes = {"  done": run["done"], "  shared": run["shared"], "  does not fit": not run["fits"]}
        note = next((text for text, holds in notes.items() if holds), "")
        name = run["arm"] + (", SFT" if run["training"] == "SFT" else "")
        lines.append(
            f"{name:22} {run['seed']:5} {run['row']:19,} {run['steps']:7,} {run['seconds']:9,.1f} {run['gpus']:5}"
            f" {run['gib']:10.1f}{note}"
        )
    hours = f"{found['gpu_hours']:,.2f}" if found["gpu_hours"] >= 0.01 or not found["gpu_hours"] else "less than 0.01"
    cost = "" if found["cost"] is None else f", which cost {found['cost']:,.2f}"
    left = " that are left" if any(run["done"] for run in found["runs"]) else ""
    lines.append(f"training: {hours} GPU-hours on {found['machine']}{left}{cost}")
    prompts = f", {found['prompt_tokens']:,} tokens of prompts of tests" if found["prompt_tokens"] else ""
    lines.append(
        f"evaluation, not priced: up to {found['evaluations']} models, {' and '.join(found['tests'])}{prompts}"
    )
    return lines
