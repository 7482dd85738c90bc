"""Training by other projects, where installed: the same model on the same rows in the same kind of processes.

`torch-cp` is accelerate's context parallelism (torch's `context_parallel`, keys and values gathered) over FSDP2 with
activation checkpointing and torch's AdamW in float32: what accelerate's own guide sets up. Its loss is
transformers', which holds the logits of every token. `deepspeed-alst` is DeepSpeed's (`ultralong.bench.training.alst`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultralong.bench.training.alst import alst_step
from ultralong.bench.training.case import TrainingCase
from ultralong.bench.training.measure import DATASHEET_FLOPS
from ultralong.bench.training.work import prepare_training, random_model
from ultralong.planner.shapes import model_config, shape_of
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import read_json, write_json
from ultralong.utils.processes import start_method
from ultralong.utils.units import GIB

PEERS = ("torch-cp-flash", "torch-cp-cudnn", "deepspeed-alst")
NEEDED = {"deepspeed-alst": "deepspeed"}  # packages beyond those that this project needs itself
STEPS = 3  # the first does not count


def measure_peer(name: str, case: TrainingCase, folder: Path) -> dict[str, Any]:
    """A peer's row, like `ultralong.bench.training.measure.measure`'s.

    Args:
        name: One of `PEERS`.
        case: The model, its depth, the row's tokens and the GPUs; two or more.
        folder: Where models and rows are kept.
    """
    config = model_config(case.model)
    config.num_hidden_layers = case.layers or config.num_hidden_layers
    shape = shape_of(config)
    with ProcessPoolExecutor(1, mp_context=get_context(start_method())) as other:
        facts = other.submit(machine_facts).result()
    row = {
        "peer": name,
        "model": case.name,
        "parameters": shape.parameters,
        "tokens": case.tokens,
        "gpus": case.gpus,
        "gpu": facts["device"],
        "date": facts["date"],
        "versions": facts["packages"],
    }
    needed = NEEDED.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:  # before rows are made and processes started
        return row | {"note": f"{needed} is not installed (pip install {needed})"}
    made = prepare_training(folder, case.model, case.layers, [case.tokens])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(case.gpus),
            "-m",
            "ultralong.bench.training.peers",
            name,
            made["model"],
            str(case.tokens),
            place,
        ]
        environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            return row | {
                "note": lines[0].split(":", 1)[-1].strip()[:300] if lines else f"exit code {done.returncode}",
                "messages": done.stderr[-4000:],
            }
        ranks = [read_json(path) for path in sorted(Path(place).glob("rank-*.json"))]
    seconds = max(rank["seconds"] for rank in ranks)
    return row | {
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second_per_gpu": round(case.tokens / seconds / case.gpus, 1),
        "mfu_causal": round(shape.model_flops(case.tokens) / seconds / case.gpus / DATASHEET_FLOPS, 4),
        "peak_gpu_gib": round(max(rank["peak"] for rank in ranks) / GIB, 3),
        "losses": ranks[0]["losses"],
    }


def work(name: str, model_folder: str, tokens: int, place: Path) -> None:
    """Train some steps; write their seconds and the peak of memory."""
    cuda, rank = torch.cuda.is_available(), os.environ["RANK"]
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = SDPBackend.FLASH_ATTENTION if name.endswith("flash") else SDPBackend.CUDNN_ATTENTION
    generator = torch.Generator().manual_seed(0)
    times, losses = [], []
    with sdpa_kernel(backend) if cuda else nullcontext():
        step = alst_step(model_folder, tokens) if name == "deepspeed-alst" else _torch_cp_step(model_folder, tokens)
        for _ in range(STEPS):
            ids = torch.randint(0, 256, (1, tokens), generator=generator).to("cuda" if cuda else "cpu")
            begin = time.perf_counter()
            losses.append(step(ids))  # a number read back: the device is done with the passes
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    write_json(place / f"rank-{rank}.json", {"seconds": median(times[1:]), "peak": peak, "losses": losses})
    print(json.dumps(times))


def _torch_cp_step(model_folder: str, tokens: int) -> Callable[[Tensor], float]:
    """A training step with accelerate's context parallelism."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.utils import TorchContextParallelConfig

    parallel = ParallelismConfig(
        cp_size=int(os.environ["WORLD_SIZE"]), cp_handler=TorchContextParallelConfig(cp_comm_strategy="allgather")
    )
    model = random_model(model_folder, torch.device("cuda", int(os.environ["LOCAL_RANK"])), "sdpa")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        activation_checkpointing=True,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        transformer_cls_names_to_wrap=[type(model.get_decoder().layers[0]).__name__],
    )
    accelerator = Accelerator(mixed_precision="bf16", parallelism_config=parallel, fsdp_plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    def step(ids: Tensor) -> float:
        labels, positions = ids.roll(-1, 1), torch.arange(tokens, device=accelerator.device)[None]
        with accelerator.maybe_context_parallel(
            buffers=[ids, labels, positions], buffer_seq_dims=[1, 1, 1], no_restore_buffers={ids, labels, positions}
        ):
            loss = model(
                input_ids=ids, labels=labels, shift_labels=labels, position_ids=positions, use_cache=False
            ).loss
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
