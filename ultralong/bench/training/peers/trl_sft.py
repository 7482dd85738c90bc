"""TRL's `SFTTrainer` with context parallelism, as its guide on distributed training sets it up.

FSDP2 with its own activation checkpointing and accelerate's context parallelism, whole rows (TRL refuses packed ones
there). What differs from the accelerate peer: the loss, whose logits TRL makes chunk by chunk, and transformers'
training loop around the step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultralong.bench.training.peers.accelerate_cp import context_parallel
from ultralong.bench.training.work import random_model


def sft_settings(out: str, tokens: int, steps: int, layer: str, world: int, cuda: bool = True) -> dict[str, Any]:
    """Arguments of `SFTConfig`.

    Args:
        out: Folder of the run.
        tokens: Length of a row.
        steps: Training steps.
        layer: Class of the decoder layers, each sharded and recomputed.
        world: Processes that share each row; one shards nothing.
        cuda: Train on GPUs, in bfloat16.
    """
    shared = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer],
            "activation_checkpointing": True,
            "reshard_after_forward": True,
        },
        "parallelism_config": context_parallel(world),
        "pad_to_multiple_of": 2 * world,
    }
    return {
        "output_dir": out,
        "max_length": tokens,
        "packing": False,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",  # short rows first
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "learning_rate": 3e-5,
        "optim": "adamw_torch_fused" if cuda else "adamw_torch",
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **(shared if world > 1 else {}),
    }


def sft_train(
    model_folder: str, tokens: int, rows: list[Tensor], out: str, done: Callable[[float, float], None]
) -> None:
    """Train on rows, one a step, made in a process of torchrun.

    Args:
        model_folder: Folder of the model's config and tokenizer.
        tokens: Length of a row.
        rows: Ids (1, T), the same in every process.
        out: Folder of the run.
        done: Called after each step with its seconds and its loss.

    Raises:
        ImportError: TRL or datasets is not installed.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    model = random_model(model_folder, device, "sdpa", torch.float32)  # the trainer computes in bfloat16
    layer = type(model.get_decoder().layers[0]).__name__
    world = int(os.environ.get("WORLD_SIZE", "1"))

    class Clock(TrainerCallback):
        """Seconds of each step; the loss comes with the log that follows it."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, *_: Any, **more: Any) -> None:
            if "loss" in more["logs"]:
                done(self.seconds, more["logs"]["loss"])

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**sft_settings(out, tokens, len(rows), layer, world, cuda)),
        train_dataset=Dataset.from_dict({"input_ids": [row[0].tolist() for row in rows]}),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[Clock()],
    )
    trainer.train()
