"""One case of the training bench."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.config import MemoryConfig
from ultralong.utils.units import Tokens, parse_tokens


@dataclass(frozen=True)
class RowCount:
    """So many rows of a length in each step."""

    tokens: int
    rows: int


def parse_mix(words: Sequence[str]) -> tuple[RowCount, ...]:
    """A mix such as 8k:38 128k:1 256k:1.

    Raises:
        ValueError: A word is not LENGTH:ROWS.
    """
    found = []
    for word in words:
        length, _, rows = word.partition(":")
        if not rows.isdecimal() or int(rows) < 1:
            raise ValueError(f"a part of a mix is LENGTH:ROWS, such as 8k:38, found {word!r}.")
        found.append(RowCount(int(parse_tokens(length)), int(rows)))
    return tuple(found)


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
        lora_rank: Rank of LoRA adapters at attention's projections; 0 trains every parameter.
        lora_whole: With `lora_rank`: embeddings and norms are trained too (LongLoRA).
        lora_base: With `lora_rank`: the frozen matrices in the run's type (full) or in 4 bits (nf4).
        kernel: Attention kernel.
        head_chunks: Head chunks of the attention scheme: more make its buffers smaller.
        memory: As in `MemoryConfig`.
        fit: Let the planner choose what is kept, offloaded and recomputed.
        gpu_memory: With `fit` or `capped`: GiB of one GPU; by default the machine's.
        capped: Hold each process to `gpu_memory` of its GPU, CUDA's context included. Whether a row fits is then what a
            card of that size would say; the seconds are this GPU's. One warm step comes before at least: the driver
            holds more once the kernels of these rows are loaded.
        host_memory: With `fit`: GiB of host memory for one process; without it nothing is offloaded.
        steps: Measured steps; two on a short row come before.
        profile: Profile one more step; the row then has the time of its kernels, by kind and by name.
        documents: Rows of this many documents that don't see each other, their lengths spread over two orders of
            magnitude; 0 is a whole row, whose tokens see all before them.
        document_lengths: Rows of documents of these tokens that don't see each other, in this order and over and over
            to the row's end: those of a real packed row, for example. Instead of `documents`.
        warm_steps: Steps over the measured rows before the measured steps, besides the two short ones: their shapes'
            kernels are compiled there. A peer takes the same ones before its own, but one at least, and no short ones,
            where what it compiles or pins is for one length.
        mix: Rows of several lengths in each step instead of one row, as LENGTH:ROWS, such as 8k:38 128k:1 256k:1. Rows
            of up to 8k hold short conversations, longer ones are one text.
        sharing: With `mix`: each row by as many GPUs as it needs (dynamic), or every row by all of them (fixed).
        degree: With `mix` and fixed sharing: GPUs that share every row, in groups that work side by side; by default
            all.
        max_tokens_per_rank: With `mix`: most tokens of a pack on one GPU; by default the longest row's share.
    """

    model: str = "meta-llama/Llama-3.1-8B"
    tokens: Tokens = 131072
    layers: int | None = None
    gpus: int = 1
    sharded: bool = False
    state_precision: Literal["float32", "8bit"] = "float32"
    lora_rank: int = 0
    lora_whole: bool = False
    lora_base: Literal["full", "nf4"] = "full"
    kernel: str = "auto"
    head_chunks: int | None = None
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(activation_checkpointing=True))
    fit: bool = False
    gpu_memory: float | None = None
    capped: bool = False
    host_memory: float | None = None
    steps: int = 2
    profile: bool = False
    documents: int = 0
    document_lengths: tuple[Tokens, ...] = ()
    warm_steps: int = 0
    mix: tuple[str, ...] = ()
    sharing: Literal["dynamic", "fixed"] = "dynamic"
    degree: int | None = None
    max_tokens_per_rank: Tokens | None = None

    def __post_init__(self) -> None:
        if self.documents < 0 or (self.documents and self.mix):
            raise ValueError(f"documents must be 0 or more, and 0 with a mix, found {self.documents}.")
        if any(length < 1 for length in self.document_lengths) or (
            self.document_lengths and (self.mix or self.documents)
        ):
            raise ValueError(
                f"document_lengths must be 1 or more, and go without mix and documents, found {self.document_lengths}."
            )
        if self.capped and not self.gpu_memory:
            raise ValueError("capped holds a process to gpu_memory GiB: say how many (--gpu-memory 24).")
        if self.warm_steps < 0:
            raise ValueError(f"warm_steps must be 0 or more, found {self.warm_steps}.")
        rows = sum(part.rows for part in parse_mix(self.mix))
        groups, rest = divmod(self.gpus, self.shared_by)
        if rest or (self.sharing == "fixed" and rows % groups):
            raise ValueError(
                f"degree must divide {self.gpus} GPUs into groups that read as many of the mix's {rows} rows each, "
                f"found {self.degree}."
            )

    def edges(self, tokens: int) -> tuple[int, ...]:
        """Where the documents of a row of so many tokens begin, and its end; empty for a whole row."""
        if not self.document_lengths:
            from ultralong.bench.attention.measure import documents as spread_documents  # needs torch, help does not

            return spread_documents(tokens, self.documents) if self.documents else ()
        ends = itertools.accumulate(itertools.cycle(self.document_lengths))
        return (0, *itertools.takewhile(lambda end: end < tokens, ends), tokens)

    @property
    def lora(self) -> LoRAConfig:
        """The run's adapters."""
        whole = self.lora_whole
        return LoRAConfig(self.lora_rank, train_embeddings=whole, train_norms=whole, base=self.lora_base)

    @property
    def shared_by(self) -> int:
        """GPUs that share a row, at most."""
        return self.gpus if self.degree is None or self.sharing == "dynamic" else self.degree

    @property
    def warming(self) -> int:
        """Steps over the measured rows that come before: one at least where the memory is capped."""
        return max(self.warm_steps, int(self.capped))

    @property
    def name(self) -> str:
        """The model, and whether it was cut short."""
        return Path(self.model).name + (f", {self.layers} layers" if self.layers is not None else "")
