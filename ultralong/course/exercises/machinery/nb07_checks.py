"""What the exercises of 07_memory_and_the_trainer compute: right answers, wrong ones, and the checks.

N tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ultralong.planner.machine import load_machine
from ultralong.planner.memory import STATE_BYTES, gpu_memory, host_memory
from ultralong.planner.shapes import planned_model, shape_of
from ultralong.planner.step_time import step_time
from ultralong.planner.traces.tracker import Tracker
from ultralong.planner.workload import Workload
from ultralong.training.config import MemoryConfig, TrainConfig, preset
from ultralong.utils.settings import load

GIB = 2**30
STEP = 1024  # rows are multiples of this

# ---- 07.states


def state_bytes(parameters: int, gpus: int, eight_bit: bool) -> float:
    """Bytes on each GPU of float32 parameters, their gradients and AdamW's two states, sharded."""
    adam = 2 * (1 + 4 / 256) if eight_bit else 2 * 4
    return parameters * (4 + 4 + adam) / gpus


def states_one_moment(parameters: int, gpus: int, eight_bit: bool) -> float:
    """Mistake: AdamW has one moment."""
    return parameters * (4 + 4 + ((1 + 4 / 256) if eight_bit else 4)) / gpus


def states_no_gradients(parameters: int, gpus: int, eight_bit: bool) -> float:
    """Mistake: gradients take nothing."""
    return state_bytes(parameters, gpus, eight_bit) - 4 * parameters / gpus


def states_no_scales(parameters: int, gpus: int, eight_bit: bool) -> float:
    """Mistake: states of 8 bits have no scales."""
    return parameters * (8 + (2 if eight_bit else 8)) / gpus


def check_states(answer: Any) -> str:
    """Bytes of the states for two models, in float32 and 8 bits."""
    for parameters, gpus, eight_bit in ((8_030_261_248, 2, True), (8_030_261_248, 1, False), (1_000_000, 4, True)):
        found = float(answer(parameters, gpus, eight_bit))
        adam = STATE_BYTES["8bit" if eight_bit else "float32"]
        right = parameters * (8 + adam) / gpus
        say = f"{parameters:,} parameters over {gpus} GPUs{', 8-bit states' if eight_bit else ''}: "
        assert found > right / 2**9, say + f"you give {found:g}. Give bytes, not GB or GiB."
        assert gpus == 1 or not math.isclose(found, right * gpus), (
            say + f"{found / GIB:.3f} GiB is all of them. FSDP shards all three: each GPU has 1/{gpus}."
        )
        assert not math.isclose(found, right - 4 * parameters / gpus), (
            say + "gradients are missing, another float32 for each parameter."
        )
        assert not math.isclose(found, right - adam / 2 * parameters / gpus), (
            say + "AdamW keeps two states, the mean of the gradient and the mean of its square."
        )
        assert not eight_bit or not math.isclose(found, parameters * 10 / gpus), (
            say + "8-bit states need a float32 scale for each block of 256, 4/256 of a byte for each value."
        )
        assert math.isclose(found, right, rel_tol=1e-6), say + f"{right / GIB:.3f} GiB, yours {found / GIB:.3f}."
    return "16 bytes a parameter, 10.03 with 8-bit states, divided by the GPUs that share them."


# ---- 07.tiled_loss


def tiled_loss(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Mean cross entropy over the targets, the logits of `tile` tokens at a time."""
    total, count = hidden.new_zeros(()), (labels != -100).sum()
    for start in range(0, len(labels), tile):
        part = slice(start, start + tile)
        total = total + cross_entropy(hidden[part] @ weight.T, labels[part], reduction="sum")
    return total / count


def tiled_mean_of_means(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Mistake: the mean of the tiles' means, whatever the targets in each."""
    starts = range(0, len(labels), tile)
    parts = [cross_entropy(hidden[s : s + tile] @ weight.T, labels[s : s + tile]) for s in starts]
    return torch.stack(parts).mean()


def tiled_all_tokens(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Mistake: tokens without a target count in the mean."""
    return tiled_loss(hidden, weight, labels, tile) * (labels != -100).sum() / len(labels)


def tiled_not_at_all(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Mistake: all logits are made at once."""
    return cross_entropy(hidden @ weight.T, labels)


def tiled_no_rest(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Mistake: tokens after the last whole tile are left out."""
    whole = len(labels) // tile * tile
    return tiled_loss(hidden[:whole], weight, labels[:whole], tile)


def check_tiled_loss(answer: Any) -> str:
    """The loss against that of all logits, and the memory that it takes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(512, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 512, (200,), generator=generator)
    labels[:90] = -100  # a prompt: no targets there
    right = cross_entropy(hidden @ weight.T, labels)
    with torch.no_grad(), Tracker() as tracker:
        found = answer(hidden, weight, labels, 64)
    found = torch.as_tensor(found)

    def same(other: Tensor) -> bool:
        return bool(torch.isclose(found, other, rtol=1e-9))

    tiles = [range(s, min(s + 64, 200)) for s in range(0, 200, 64)]
    assert not found.isnan(), (
        "A tile without a target has no mean, 0 / 0. Add up the losses of all tiles, and divide once at the end."
    )
    assert not same(tiled_all_tokens(hidden, weight, labels, 64)), (
        f"You divided by all {len(labels)} tokens. Only {int((labels != -100).sum())} are targets; -100 is none."
    )
    assert not same(tiled_no_rest(hidden, weight, labels, 64)), (
        f"200 tokens in tiles of 64 leave {len(tiles[-1])} in the last tile: yours drops them."
    )
    full = labels.clone()
    full[:90] = 7
    later = torch.as_tensor(answer(hidden, weight, full, 64))
    assert same(right) and torch.isclose(later, cross_entropy(hidden @ weight.T, full), rtol=1e-9), (
        "Not the mean over all targets. A mean of tile means weighs a target in a short tile more than others."
    )
    assert tracker.peak < 200 * 512 * 8, (
        f"Right, but {tracker.peak:,} bytes were alive at once: the logits of all tokens. Multiply a tile at a time."
    )
    return f"the mean over all targets, with {tracker.peak / (200 * 512 * 8):.0%} of the bytes of all logits."


# ---- 07.keep


@functools.cache
def million_on_two() -> Workload:
    """Llama-3.1-8B, rows of 1,048,576 tokens, two H200s: the preset's run, followed once on fake tensors."""
    config = load(TrainConfig, preset("llama31-8b-1m-2gpu"))
    model, _ = planned_model(config.model, config.base_model)
    return Workload(config, model, shape_of(model), load_machine("h200"), 2**20, 2)


def with_memory(job: Workload, **changes: Any) -> Workload:
    """The same run with other settings of `memory:`."""
    memory = replace(job.config.memory, **changes)
    return replace(job, config=replace(job.config, memory=memory))


def totals(job: Workload) -> tuple[float, float, float]:
    """GiB on each GPU, GiB of host memory for each process, seconds of a step."""
    gpu, host, step = gpu_memory(job), host_memory(job), step_time(job)
    first, second = (sum(line.value for line in lines if line.counts) / GIB for lines in (gpu, host))
    return first, second, sum(line.value for line in step)


KEEP = ("attention_outputs_on_gpu", "attention_outputs_offloaded", "layer_inputs_offloaded", "checkpoint_every")


def keep(on_gpu: int, offloaded: int, inputs_offloaded: int, every: int) -> dict[str, int]:
    """Settings of `memory:` by position."""
    return dict(zip(KEEP, (on_gpu, offloaded, inputs_offloaded, every), strict=True))


def check_keep(answer: Any) -> str:
    """With these settings the planned step fits GPUs and host, and computes little again."""
    keys = set(answer) if isinstance(answer, dict) else set()
    assert keys == set(KEEP), f"Give a dict with the keys {', '.join(KEEP)}; found {sorted(keys) or answer!r}."
    job = million_on_two()
    try:
        MemoryConfig(activation_checkpointing=True, layer_tile=65536, **answer)
    except ValueError as error:
        raise AssertionError(f"The trainer refuses it: {error}") from error
    gpu, host, seconds = totals(with_memory(job, **answer))
    there = job.machine.memory / GIB
    assert host <= 128, (
        f"Host memory: {host:.0f} GiB a process, and there are 128. Each offloaded input or output of a layer takes "
        "4 GiB. Offload fewer of them."
    )
    assert gpu <= there, (
        f"GPU memory: {gpu:.0f} GiB, and there are {there:.0f}. Offload attention outputs, or keep fewer layer inputs "
        "(checkpoint_every)."
    )
    assert seconds <= 880, (
        f"It fits with {gpu:.0f} GiB, but a step takes {seconds:.0f} s: attention whose output is nowhere stored is "
        "computed again. Where is room for more outputs?"
    )
    return f"{gpu:.0f} GiB on each GPU, {host:.0f} GiB on the host, {seconds:.0f} s a step by the plan."


# ---- 07.longest


def longest(fixed: float, per_token: float, budget: float, ranks: int) -> int:
    """Longest row, in tokens, that `ranks` GPUs can share; a multiple of 1,024 tokens on each of them."""
    return max(0, int((budget - fixed) / per_token) // STEP * STEP) * ranks


def check_longest(answer: Any) -> str:
    """The longest row for three budgets, one of which holds no row."""
    for fixed, per_token, budget, ranks in ((30e9, 200e3, 150e9, 2), (30e9, 130e3, 150e9, 1), (160e9, 1e5, 150e9, 4)):
        right, found = longest(fixed, per_token, budget, ranks), answer(fixed, per_token, budget, ranks)
        say = f"{fixed / 1e9:.0f} GB fixed, {per_token:,.0f} bytes a token, {budget / 1e9:.0f} GB, {ranks} ranks: "
        assert budget > fixed or found == 0, (
            say + f"the fixed part alone is too large, so no row fits: 0, yours {found:,}."
        )
        assert not budget > fixed or abs(found - budget / per_token * ranks) > STEP * ranks, (
            say + "you gave the whole budget to tokens. Parameters and states are there already."
        )
        assert ranks == 1 or not 0 < found == right // ranks, (
            say + f"{found:,} tokens fit on one GPU, and {ranks} of them share the row."
        )
        assert found <= right or found == 0, say + f"{found:,} tokens do not fit. Round down to 1,024 a GPU, not up."
        assert found == right, say + f"{right:,} tokens fit, yours says {found:,}."
    return "what is left of the budget, over the bytes of a token, times the ranks."


# ---- 07.scale


def scale(targets: list[int], rank: int) -> float:
    """Factor on a rank's summed loss, where gradients are averaged over ranks afterwards."""
    return len(targets) / sum(targets)


def check_scale(answer: Any) -> str:
    """Summed losses with this factor give the gradients of the mean over all targets."""
    targets = [30, 10, 5]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in targets]
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(((torch.cat(inputs) @ weight - 1) ** 2).mean(), weight)
    found = torch.zeros(4, dtype=torch.float64)
    for rank, part in enumerate(inputs):  # what DistributedDataParallel and FSDP2 do: a mean over ranks
        loss = ((part @ weight - 1) ** 2).sum() * answer(list(targets), rank)
        found += torch.autograd.grad(loss, weight)[0] / len(targets)
    ratio = float(found.norm() / right.norm())
    own = [answer(list(targets), rank) for rank in range(3)]
    assert not all(math.isclose(own[rank] * targets[rank], 1) for rank in range(3)), (
        f"Each rank divides by its own targets ({', '.join(map(str, targets))}): a mean of means. The rank with "
        f"{targets[2]} targets then weighs as much as the one with {targets[0]}."
    )
    assert not math.isclose(ratio, 1 / len(targets)), (
        f"The gradient is {ratio:.2f} of the right one: averaging over the {len(targets)} ranks divides once more."
    )
    assert not math.isclose(ratio, len(targets)), (
        f"The gradient is {len(targets)} times too large: multiply by the number of ranks once."
    )
    assert torch.allclose(found, right), f"The gradient is {ratio:.3f} of the one on one rank. Count targets of all."
    return "the same gradient as on one rank, however targets are spread."
