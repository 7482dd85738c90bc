"""Time and memory of training steps here: `python -m ultralong.bench.training MODEL --lengths N --json FILE`.

Each case is a real run of the trainer on a model with random weights and rows of random text, in processes of its own,
so that one that runs out of memory leaves no trace in the next. The first step, which compiles and fills caches, does
not count. Useful work is causal work without recomputation (`ultralong.plan.shapes.Shape.model_flops`), against the
989 TF/s that the datasheet of H100 and H200 gives for bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ultralong import settings
from ultralong.bench.machine import machine_facts
from ultralong.data.documents import Document
from ultralong.data.packing import PackSettings, pack
from ultralong.data.tokens import tokenize_corpus
from ultralong.files import read_json, read_jsonl, write_json
from ultralong.miniature.tokenizer import train_tokenizer
from ultralong.plan import plan
from ultralong.plan.shapes import model_config, shape_of
from ultralong.training.config import DataSource, MemoryConfig, ParallelConfig, TrainConfig

DATASHEET_FLOPS = 989e12
GIB = 2**30


@dataclass(frozen=True)
class TrainingCase:
    """One run to measure.

    Attributes:
        model: A model folder, a hub id, or a shape that the planner knows.
        tokens: Tokens of a row.
        layers: Decoder layers to keep; None keeps all. A model cut short is named so in its result.
        gpus: Processes, all of which share a row.
        checkpoint_layers: As in `MemoryConfig`.
        steps: Steps; the first does not count.
    """

    model: str
    tokens: int
    layers: int | None = None
    gpus: int = 1
    checkpoint_layers: bool = True
    steps: int = 3


def measure(case: TrainingCase, machine: str = "h200") -> dict[str, Any]:
    """Run a case and return its row: seconds, rates and peaks, and what `ultralong.plan` had said of them.

    Args:
        case: What to run.
        machine: What the plan reckons with, see `ultralong.plan.load_machine`.

    Returns:
        The row; where the run failed, a `note` with the reason takes the place of what was measured.
    """
    config = model_config(case.model)
    if case.layers is not None:
        config.num_hidden_layers = case.layers
    shape = shape_of(config)
    name = Path(case.model).name + (f", {case.layers} layers" if case.layers is not None else "")
    row: dict[str, Any] = {"model": name, "parameters": shape.parameters, "tokens": case.tokens, "gpus": case.gpus,
                           "checkpoint_layers": case.checkpoint_layers}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            # Not in this process, whose own memory on the GPU would then be counted as the trainer's.
            other.submit(_prepare, folder, config, case).result()
        row |= planned(folder / "config.yaml", case.gpus, machine)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus),
                   "-m", "ultralong.bench.training", "--worker", str(folder)]
        environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            return row | {"note": lines[0].split(":", 1)[-1].strip()[:200] if lines else f"exit code {done.returncode}"}
        ranks = [read_json(path) for path in sorted(folder.glob("rank-*.json"))]
        log = read_jsonl(folder / "run" / "log.jsonl")
    seconds = median(record["seconds"] for record in log[1:])
    rate = case.tokens / seconds / case.gpus
    return row | {
        "seconds_per_step": round(seconds, 4), "tokens_per_second_per_gpu": round(rate, 1),
        "mfu_causal": round(shape.model_flops(case.tokens) / seconds / case.gpus / DATASHEET_FLOPS, 4),
        **{key: round(max(rank[key] for rank in ranks) / GIB, 3) for key in ranks[0]},
        "loss": log[-1]["loss"],
    }


def planned(config: Path, gpus: int, machine: str) -> dict[str, float]:
    """What the plan says of the run, under the names of what is measured."""
    said = plan(settings.load(TrainConfig, config), gpus, machine=machine).to_dict()
    return {key: value for key, value in said.items() if key.startswith("planned_") and key != "planned_longest_row"}


def _prepare(folder: Path, config: Any, case: TrainingCase) -> None:
    """Write a model with random weights, rows of random letters, and the config that trains one on the other."""
    tokenizer = train_tokenizer(["a b c"], case.tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.max_position_embeddings = case.tokens
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # One byte a token, as the tokenizer has learnt no merges; two rows are as good as many, and quicker to make.
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size=2 * case.tokens + 16, dtype=np.uint8)
    documents = [Document("noise", letters.tobytes().decode("ascii"), "synthetic", "CC0-1.0")]
    store = tokenize_corpus(documents, tokenizer, folder / "tokens", quiet=True)
    pack(store, tokenizer, folder / "rows", PackSettings(length=case.tokens), quiet=True)
    run = TrainConfig(
        model=str(folder / "model"), out=str(folder / "run"), data=(DataSource(str(folder / "rows")),),
        steps=case.steps, parallel=ParallelConfig(sequence=case.gpus),
        memory=MemoryConfig(checkpoint_layers=case.checkpoint_layers))
    settings.save(run, folder / "config.yaml")


def _work(folder: Path) -> None:
    """What each process of a case does: train, then write down its own peaks in bytes."""
    from ultralong.training.loop import train

    train(settings.load(TrainConfig, folder / "config.yaml"), quiet=True)
    peaks = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.max_memory_reserved()
        # Whatever the driver counts and the allocator does not is the context, the kernels and the libraries.
        context = total - free - torch.cuda.memory_reserved()
        peaks |= {"peak_gpu_gib": torch.cuda.max_memory_allocated(), "reserved_gpu_gib": reserved,
                  "context_gpu_gib": context}
    write_json(folder / f"rank-{os.environ.get('RANK', '0')}.json", peaks)


def main(arguments: list[str] | None = None) -> None:
    """Measure every length and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m ultralong.bench.training", description=__doc__)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384], help="tokens of a row")
    parser.add_argument("--layers", type=int, help="keep this many decoder layers")
    parser.add_argument("--gpus", type=int, default=1, help="processes that share a row")
    parser.add_argument("--keep-layers", action="store_true", help="keep what a layer computes, recompute nothing")
    parser.add_argument("--machine", default="h200", help="rates that the plan beside each row reckons with")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        _work(options.worker)
        return
    rows = []
    for tokens in options.lengths:
        case = TrainingCase(options.model, tokens, options.layers, options.gpus, not options.keep_layers)
        rows.append(measure(case, options.machine))
        print(json.dumps(rows[-1]), flush=True)
    if options.json is not None:
        write_json(options.json, {"machine": machine_facts(), "rows": rows})


if __name__ == "__main__":
    main()
