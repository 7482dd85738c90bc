"""What the benches share: a model's first layers with random weights, the clock, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong import attention
from ultralong.planner.shapes import model_config
from ultralong.utils.local_ranks import run_ranks
from ultralong.utils.units import GIB

T = TypeVar("T")


def cut_config(model: str, layers: int | None) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of a model with its first layers only, and what rows say of it; None keeps all layers."""
    config = model_config(model)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if layers is not None:
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = kinds[:layers]
        text.num_hidden_layers = layers
    kept = text.num_hidden_layers
    name = Path(model).name + ("" if kept == whole else f", cut to {kept} of {whole} layers")
    return config, {"model": name, "layers": kept, "of_layers": whole}


def make_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """A model with random weights, made where it stays: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device if device == "cpu" else torch.device("cuda", torch.cuda.current_device())):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()


def over_gpus(work: Callable[..., T], gpus: int, *arguments: Any) -> T:
    """Run `work(rank, world, device, *arguments)`, here for one GPU, else in a process for each.

    Args:
        work: Measures; importable by name.
        gpus: How many processes there are; on a CPU as many share it.
        *arguments: The same in every process.

    Returns:
        What the first process returns.

    Raises:
        ValueError: Fewer GPUs than asked for.
        ultralong.utils.local_ranks.RankFailed: A process failed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and gpus > torch.cuda.device_count():
        raise ValueError(f"{gpus} GPUs were asked for, and this machine has {torch.cuda.device_count()}")
    if gpus == 1:
        return work(0, 1, device, *arguments)
    return run_ranks(work, gpus, device, *arguments, device=device, timeout=3600)[0]


def random_ids(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """Random token ids (rows, tokens), the same in every process."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)


def now(device: torch.device) -> float:
    """The time in seconds, once all processes and their GPUs are done so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def slowest(value: float, device: torch.device) -> float:
    """The largest value of any process."""
    if not dist.is_initialized():
        return value
    largest: Tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def peak_gib(device: torch.device) -> float:
    """Most GPU memory in GiB since `clear`, of the process that took most; 0 on a CPU."""
    return slowest(torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0, device)


def clear(device: torch.device) -> None:
    """Give unused memory back, and count the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
