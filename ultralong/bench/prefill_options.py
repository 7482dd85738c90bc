"""Options of the prefill bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ultralong.utils.units import Tokens


@dataclass(frozen=True)
class PrefillBench:
    """Options of the prefill bench.

    Attributes:
        model: A model folder, a hub id, or a shape that the planner knows; weights are random in any case.
        lengths: Tokens of the prompts.
        gpus: Processes that share a prompt.
        layers: Decoder layers to keep; by default all. A model cut short is named so in its rows.
        kv: Type of keys and values: bf16 or fp8.
        chunk: Tokens of one pass; by default 65,536 for each GPU.
        kernel: Name of the attention kernel, or auto.
    """

    model: str
    lengths: tuple[Tokens, ...] = (262144, 1048576)
    gpus: int = 1
    layers: int | None = None
    kv: Literal["bf16", "fp8"] = "bf16"
    chunk: Tokens | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.kv not in ("bf16", "fp8"):
            raise ValueError(f"kv must be bf16 or fp8, found {self.kv!r}")
        if min(self.lengths, default=0) < 2:
            raise ValueError(f"lengths must be two tokens or more, found {list(self.lengths)}")
        if self.gpus < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError(f"gpus and layers must be 1 or more, found {self.gpus} and {self.layers}")
