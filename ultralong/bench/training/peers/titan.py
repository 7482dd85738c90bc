"""torchtitan's context parallelism: its own trainer and its own Llama at a model's shape (torchtitan 0.2.2).

Its guide names the options and leaves their choice: here FSDP2 and context parallelism over all GPUs, heads and tails
of the row dealt out evenly, every layer recomputed, layers and loss compiled, AdamW in float32. Its Llama has no tied
embeddings: of a model with tied ones it trains a second matrix.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from ultralong.checkpoints.config import head_size

RELEASE = "0.2.2"  # the last one that imports with torch 2.11; the next has other settings
NAME = "llama3-of-the-bench"


def llama_settings(config: Any) -> dict[str, Any]:
    """Arguments of torchtitan's `TransformerModelArgs` for a Llama's config.

    Args:
        config: transformers' `LlamaConfig`.

    Raises:
        ValueError: The model is no Llama, or its head size is not the hidden size over the heads.
    """
    head = head_size(config)
    if config.model_type != "llama" or head * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"torchtitan-cp trains Llama's shapes, found {config.model_type} with heads of {head}.")
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        # It rounds two thirds of four hidden sizes, times a factor, up to a multiple: here to the multiple itself.
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": config.intermediate_size / (8 * config.hidden_size),
        "norm_eps": config.rms_norm_eps,
    }


def job_settings(model_folder: str, tokens: int, steps: int, world: int, out: str) -> dict[str, dict[str, Any]]:
    """Values of torchtitan's `JobConfig`, by section."""
    return {
        "job": {"dump_folder": out},
        "metrics": {"log_freq": 1},
        "model": {"name": NAME, "flavor": "bench", "hf_assets_path": model_folder},
        "optimizer": {"lr": 3e-5},
        "lr_scheduler": {"warmup_steps": 0},
        "training": {"local_batch_size": 1, "seq_len": tokens, "steps": steps},
        "parallelism": {"context_parallel_degree": world},
        "activation_checkpoint": {"mode": "full"},
        "compile": {"enable": True},
        "comm": {"init_timeout_seconds": 1800},  # its 300 s are short for layers that are compiled in the first step
    }


def build_trainer(model_folder: str, tokens: int, rows: list[Tensor], out: str) -> Any:
    """Trainer of torchtitan over rows, one a step, made in a process of torchrun with a GPU.

    Raises:
        ValueError: Another release is installed, or the model is no Llama.
        ImportError: torchtitan is not installed.
    """
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    args = TransformerModelArgs(**llama_settings(AutoConfig.from_pretrained(model_folder)))
    spec = replace(
        get_train_spec(),
        model_args={"bench": args},
        build_dataloader_fn=lambda **_: Rows(rows),
        build_tokenizer_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec(NAME, spec)
    job, world = JobConfig(), int(os.environ["WORLD_SIZE"])
    for section, values in job_settings(model_folder, tokens, len(rows), world, out).items():
        for key, value in values.items():
            if not hasattr(getattr(job, section), key):  # a name of another release would be set and never read
                raise ValueError(f"torchtitan has no setting {section}.{key}.")
            setattr(getattr(job, section), key, value)
    return Trainer(job)


class Rows:
    """A dataloader of torchtitan's: ids (1, T) and the ids that follow them."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        yield from (({"input": row}, row.roll(-1, 1)) for row in self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a bench is not resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse: a bench is not resumed.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a bench is not resumed.")


def titan_step(model_folder: str, tokens: int, rows: list[Tensor], out: str) -> Callable[[Tensor], float]:
    """One training step of torchtitan's trainer.

    Args:
        model_folder: Folder of the model's config.
        tokens: Length of a row; a multiple of twice the processes.
        rows: The rows that the steps will be asked for, in order.
        out: Folder of the run.

    Returns:
        A function from a row to the mean loss before the step; the row is the next of `rows`.

    Raises:
        ValueError: Another release of torchtitan is installed.
    """
    found = importlib.metadata.version("torchtitan")
    if found != RELEASE:
        raise ValueError(f"torchtitan {found} has other settings: install torchtitan=={RELEASE}.")
    trainer = build_trainer(model_folder, tokens, rows, out)
    losses: list[float] = []
    log = trainer.metrics_processor.log

    def keep(step: int, mean: float, *rest: Any, **more: Any) -> None:
        losses.append(float(mean))
        log(step, mean, *rest, **more)

    trainer.metrics_processor.log = keep
    batches = trainer.batch_generator(trainer.dataloader)

    def step(ids: Tensor) -> float:
        trainer.step += 1
        trainer.train_step(batches)
        return losses[-1]

    return step
