"""accelerate's context parallelism: torch's `context_parallel` over FSDP2, activation checkpointing, AdamW in float32.

What accelerate's guide sets up. Its loss is transformers', which holds the logits of every token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultralong.bench.training.work import random_model


def context_parallel(world: int) -> Any:
    """`ParallelismConfig` of so many processes that share each row, keys and values gathered."""
    from accelerate import ParallelismConfig
    from accelerate.utils import TorchContextParallelConfig

    return ParallelismConfig(cp_size=world, cp_handler=TorchContextParallelConfig(cp_comm_strategy="allgather"))


def accelerate_step(model_folder: str) -> Callable[[Tensor], float]:
    """One training step, made in a process of torchrun with a GPU.

    Args:
        model_folder: Folder of the model's config.

    Returns:
        A function from a row's ids (1, T), the same in every process, T a multiple of twice the processes, to the loss
        of this process's share.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

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
    parallel = context_parallel(int(os.environ["WORLD_SIZE"]))
    accelerator = Accelerator(mixed_precision="bf16", parallelism_config=parallel, fsdp_plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    def step(ids: Tensor) -> float:
        labels, positions = ids.roll(-1, 1), torch.arange(ids.shape[1], device=accelerator.device)[None]
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
