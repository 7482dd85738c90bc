"""One case of the training bench."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ultralong.training.config import MemoryConfig
from ultralong.utils.units import Tokens


@dataclass(frozen=True)
class TrainingCase:
    """One run to measure.

    Attributes:
        model: A model folder, a hub id, or a shape that the planner knows; only its shape is taken.
        tokens: Tokens of a row.
        layers: Decoder layers to keep; by default all. A model cut short is named so in its result.
        gpus: Processes, all of which share a row.
        sharded: Shard the parameters over the processes as well (FSDP2).
        state_precision: Precision of AdamW's states.
        kernel: Attention kernel.
        head_chunks: Head chunks of the attention scheme: more make its buffers smaller.
        memory: As in `MemoryConfig`.
        fit: Let the planner choose what is kept, offloaded and recomputed.
        gpu_memory: With fit: GiB of one GPU; by default the machine's.
        host_memory: With fit: GiB of host memory for one process; without it nothing is offloaded.
        steps: Measured steps; one on a short row comes before.
        profile: Profile one more step; the row then has the time of its kernels, by kind and by name.
        mix: Rows of several lengths in each step instead of one row, as LENGTH:ROWS, such as 8k:38 128k:1 256k:1. Rows
            of up to 8k hold short conversations, longer ones are one text.
        sharing: With mix: each row by as many GPUs as it needs (dynamic), or every row by all of them (fixed).
        max_tokens_per_rank: With mix: most tokens of a pack on one GPU; by default the longest row's share.
    """

    model: str = "meta-llama/Llama-3.1-8B"
    tokens: Tokens = 131072
    layers: int | None = None
    gpus: int = 1
    sharded: bool = False
    state_precision: Literal["float32", "8bit"] = "float32"
    kernel: str = "auto"
    head_chunks: int | None = None
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(activation_checkpointing=True))
    fit: bool = False
    gpu_memory: float | None = None
    host_memory: float | None = None
    steps: int = 2
    profile: bool = False
    mix: tuple[str, ...] = ()
    sharing: Literal["dynamic", "fixed"] = "dynamic"
    max_tokens_per_rank: Tokens | None = None

    @property
    def name(self) -> str:
        """The model, and whether it was cut short."""
        return Path(self.model).name + (f", {self.layers} layers" if self.layers is not None else "")
