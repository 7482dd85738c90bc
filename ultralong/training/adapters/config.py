"""Settings of LoRA."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = "all-linear"
SETTINGS = "adapter_config.json"  # of an adapter's folder


def is_adapter(model: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of the peft library."""
    return (Path(model).expanduser() / SETTINGS).is_file()


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA (arXiv 2106.09685): the weights are frozen, and low-rank matrices beside some of them are trained.

    LongLoRA (arXiv 2309.12307) trains embeddings and norms too, which at long length closes most of the gap to training
    every parameter.

    Attributes:
        rank: Rank of the trained matrices; 0 trains every parameter of the model instead.
        alpha: The product of the matrices is scaled by alpha / rank.
        dropout: Probability with which the adapters' inputs are dropped.
        targets: Names of the linear modules that get adapters; `all-linear` alone is all of them but the head.
        train_embeddings: Train the input embedding as well.
        train_norms: Train the norms as well.
        base: The frozen matrices of the layers in the run's type (full), or in 4 bits (nf4: QLoRA, arXiv 2305.14314),
            made again in the run's type where they are used. nf4 needs `parallel.fsdp_shard_degree`.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION
    train_embeddings: bool = False
    train_norms: bool = False
    base: Literal["full", "nf4"] = "full"

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be 0 or more, alpha above 0 and dropout from 0 to 1, found {self}.")
        if not self.targets or (ALL_LINEAR in self.targets and len(self.targets) > 1):
            raise ValueError(f"targets must name modules, or {ALL_LINEAR} alone, found {', '.join(self.targets)!r}.")
        if not self.rank and (self.train_embeddings or self.train_norms):
            raise ValueError("train_embeddings and train_norms are for lora.rank above 0: without it all is trained.")
        if not self.rank and self.base != "full":
            raise ValueError(f"base: {self.base} is for lora.rank above 0: a weight in 4 bits can't be trained.")

    def __str__(self) -> str:
        """In a few words, for a model card and a message."""
        whole = [name for name, on in (("embeddings", self.train_embeddings), ("norms", self.train_norms)) if on]
        also = f", {' and '.join(whole)} trained too" if whole else ""
        if self.base != "full":
            also += f", frozen matrices in 4 bits ({self.base})"
        return f"rank {self.rank}, alpha {self.alpha:g}, dropout {self.dropout:g} at {', '.join(self.targets)}{also}"

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0
