"""What a trainer has to be told for context parallelism, and a callback that refuses a run that was not."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ultralong.attention import NAME
from ultralong.training.huggingface.collator import ContextParallelCollator

NEEDED: dict[str, tuple[Any, str]] = {
    "per_device_train_batch_size": (1, "a pass reads one row; pack texts into it, or use gradient_accumulation_steps"),
    "remove_unused_columns": (False, "the columns of a row are read by the collator, not by the model"),
    "dataloader_num_workers": (0, "the collator knows the process group, which a worker does not have"),
    "average_tokens_across_devices": (True, "each process holds a part of a row's targets"),
}
SEQUENTIAL = "sequential"


def trainer_arguments() -> dict[str, Any]:
    """Arguments of `TrainingArguments` and TRL's `SFTConfig` that context parallelism needs."""
    return {name: value for name, (value, _) in NEEDED.items()} | {"train_sampling_strategy": SEQUENTIAL}


class ContextParallelCallback(TrainerCallback):
    """Refuses a run before its first step whose processes would not share rows as the collator thinks they do.

    Args:
        collator: The run's data collator.
    """

    def __init__(self, collator: ContextParallelCollator) -> None:
        self.collator = collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check arguments, processes, attention and order of the rows.

        Raises:
            ValueError: One of them does not fit; says which and what to set.
        """
        size, world = self.collator.context_parallel_size, args.world_size
        for name, (value, why) in NEEDED.items():
            if (found := getattr(args, name)) != value:
                raise ValueError(f"{name} must be {value} under context parallelism, found {found}: {why}.")
        if world % size:
            raise ValueError(f"context_parallel_size is {size}, and the run has {world} processes: start a multiple.")
        model = kwargs["model"]
        if (found := model.config._attn_implementation) != NAME:
            raise ValueError(f"The model was loaded with attn_implementation={found!r}; load it with {NAME!r}.")
        if hasattr(model.get_output_embeddings(), "base_layer"):
            raise ValueError("The head has an adapter, which the tiled loss would leave out: take lm_head out of it.")
        if size == 1:
            return
        if (found := getattr(args, "train_sampling_strategy", None)) != SEQUENTIAL:
            raise ValueError(
                f"train_sampling_strategy must be {SEQUENTIAL!r}, found {found!r}: processes that share a row have to "
                "get the same one. Shuffle the rows before `shared_rows`."
            )
        rows = kwargs["train_dataloader"].dataset
        if len(rows) % size or not all(_same(rows[0], rows[number]) for number in range(size)):
            raise ValueError(
                f"Each row must come {size} times, one after another, in the dataset: pass it through "
                f"shared_rows(rows, context_parallel_size={size})."
            )


def _same(first: Any, second: Any) -> bool:
    return list(first["input_ids"]) == list(second["input_ids"])
