"""Loss and gradients of every family under every scheme against eager transformers, recorded; and what is refused.

    PYTHONPATH=tests/training .venv/bin/python tests/support/family_table.py --out notebooks/results/families_cpu.json

Each cell is the worst of whole and packed rows, in float64 with transformers' own layers and with the custom backward
pass in tiles (where the family has it), and in float32 sharded by FSDP2 with grouped products of experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from families import EDGES, FAMILIES, TILED
from test_families import PLANS, WHOLE, one_pass, over_processes, referee
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong.bench.results import write_rows
from ultralong.training.loss import LanguageModelLoss
from ultralong.utils.local_ranks import run_ranks

SCHEMES = ("ring", "ulysses", "gathered")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
    "Phi": ("phi", {}),
    "StableLM, packed or shared rows": ("stablelm", {"num_key_value_heads": 2}),
    "Qwen3-MoE with output_router_logits": (
        "qwen3_moe",
        {"num_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True},
    ),
    "LFM2, packed or shared rows": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv"]}),
}


def measured(processes: int) -> list[dict[str, Any]]:
    """A row for each family and scheme."""
    rows = []
    for family in FAMILIES:
        plans = ("own layers", "tiles") if family in TILED else ("own layers", "checkpointed")
        for edges in (WHOLE, EDGES):
            referee(family, edges)  # once, before the processes are forked
        for scheme in SCHEMES:
            cases = [(family, scheme, edges, plan, False) for edges in (WHOLE, EDGES) for plan in plans]
            cases += [(family, scheme, edges, plans[1], True) for edges in (WHOLE, EDGES)]
            found = run_ranks(over_processes, processes, cases, timeout=900)[0]
            row = {"family": family, "scheme": scheme, "processes": processes, "cases": len(cases)}
            for name, sharded in (("float64", False), ("float32_fsdp", True)):
                errors = [found[case] for case in cases if case[-1] == sharded]
                row |= {f"{name}_loss": max(e[0] for e in errors), f"{name}_gradient": max(e[1] for e in errors)}
            rows.append(row)
            print(row, flush=True)
    return rows


def refused() -> dict[str, str]:
    """By model, the message with which it is refused."""
    said = {}
    for name, (kind, options) in REFUSED.items():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SMALL, **options), attn_implementation="ultralong"
        )
        try:
            LanguageModelLoss(model)
            one_pass(model, PLANS["own layers"], edges=EDGES)
        except ValueError as error:
            said[name] = str(error)
            continue
        raise SystemExit(f"{name} is not refused any more")
    return said


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, messages = measured(asked.processes), refused()
    write_rows(asked.out, rows, refused=messages)


if __name__ == "__main__":
    main()
