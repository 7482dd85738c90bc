"""What the benches of inference share: a model with random weights, the clock, and memory."""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultralong import attention
from ultralong.utils.units import GIB


def make_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """A model with random weights, made where it stays: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device if device == "cpu" else torch.device("cuda", torch.cuda.current_device())):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()


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
