"""DeepSpeed's Arctic Long Sequence Training of the same model: Ulysses, ZeRO-3, tiled feed-forward layers and loss.

Put together as its guide says (Ulysses registered with transformers before the model is made, `TiledMLP` and
`TiledFusedLogitsLoss` in place of the model's own, layers checkpointed), with torch's AdamW in float32 on the GPU and
attention by torch's cuDNN op, the faster one that it can use without flash-attention 2 or 3 installed. Its own offload
comes in two parts: the hidden states that checkpointing keeps, copied to pinned host memory by its manager, and AdamW
with its states there (ZeRO-Offload; torch's AdamW, as DeepSpeed's own is compiled with nvcc when it is first used).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from transformers import PreTrainedModel

from ultralong.bench.training.work import random_model
from ultralong.utils.units import GIB


def engine_settings(world: int, offload_optimizer: bool = False) -> dict[str, Any]:
    """DeepSpeed's config.

    Args:
        world: Processes, all of which share a row.
        offload_optimizer: AdamW and its states in host memory.
    """
    host = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "sequence_parallel_size": world,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **host},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "torch_adam": True}},
    }


def alst_step(
    model_folder: str, tokens: int, offload: bool = False, offload_optimizer: bool = False
) -> Callable[[Tensor], float]:
    """One training step of a model and its engine, made in a process of torchrun.

    Args:
        model_folder: Folder of the model's config.
        tokens: Length of the longest row; every row's is a multiple of the processes.
        offload: The hidden states that checkpointing keeps wait in host memory.
        offload_optimizer: AdamW and its states in host memory.

    Returns:
        A function from a row's ids (1, T), the same in every process, to the loss before the step.

    Raises:
        ImportError: DeepSpeed is not installed, or, with `offload`, older than 0.19 (`pip install -U deepspeed`).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(get_accelerator().current_device_name())
    groups = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model_folder,
        core_attn_implementation="sdpa",
        sequence_parallel_size=world,
        micro_batch_size=1,
    )
    model = random_model(model_folder, device, "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _tile_feed_forward(model, tokens // world)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        mpu=groups,
        config=engine_settings(world, offload_optimizer),
    )
    waiting = _offloading() if offload else nullcontext()

    def step(ids: Tensor) -> float:
        local = ids.shape[1] // world
        share = slice(rank * local, (rank + 1) * local)
        positions = torch.arange(ids.shape[1], device=ids.device)[None, share]
        with waiting:
            hidden = engine.module.get_decoder()(input_ids=ids[:, share], position_ids=positions, use_cache=False)
            loss = _tiled_loss(engine.module, hidden.last_hidden_state, ids.roll(-1, 1)[:, share])
            mean = all_reduce(loss, group=groups.get_sequence_parallel_group()) / world
            engine.backward(mean)
        engine.step()
        return mean.item()

    return step


def _offloading() -> Any:
    """DeepSpeed's manager of checkpointed hidden states, one for all steps."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        get_checkpoint_hidden_states_offloading_ctx_manager,
    )

    return get_checkpoint_hidden_states_offloading_ctx_manager(use_pin_memory=torch.cuda.is_available())


def _tile_feed_forward(model: PreTrainedModel, tokens: int) -> None:
    """Each layer's feed-forward part in as many tiles as the hidden size goes into the tokens, as the guide has it."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def feed_forward(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    for layer in model.get_decoder().layers:
        mlp, shards = layer.mlp, math.ceil(tokens / model.config.hidden_size)
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        mlp.forward = lambda x, mlp=mlp, weights=weights, shards=shards: TiledMLP.apply(
            feed_forward, mlp, x, shards, weights
        )


def _tiled_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of this process's tokens without all of their logits at once."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    head = model.get_output_embeddings()

    def loss(module: Any, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(x).float().flatten(0, -2), y.flatten())

    shards = math.ceil(hidden.shape[1] * model.config.vocab_size * 4 / GIB)  # of 1 GiB of logits, as the guide has it
    return TiledFusedLogitsLoss.apply(loss, head, hidden, labels, None, shards, [head.weight], "mean")
