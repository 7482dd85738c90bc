"""Options of the serving bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ultralong.utils.units import Tokens


@dataclass(frozen=True)
class ServeBench:
    """Options of the serving bench.

    Attributes:
        model: A model folder, a hub id, or a shape that the planner knows; weights are random in any case.
        tokens: Tokens of the prompt.
        new_tokens: Tokens of the answer.
        gpus: Processes that share the prompt.
        layers: Decoder layers to keep; by default all. A model cut short is named so in its row.
        kv: Type of keys and values: bf16 or fp8.
        chunk: Tokens of one pass; by default 65,536 for each GPU.
    """

    model: str
    tokens: Tokens = 1048576
    new_tokens: int = 256
    gpus: int = 1
    layers: int | None = None
    kv: Literal["bf16", "fp8"] = "bf16"
    chunk: Tokens | None = None

    def __post_init__(self) -> None:
        if self.kv not in ("bf16", "fp8"):
            raise ValueError(f"kv must be bf16 or fp8, found {self.kv!r}")
        if self.tokens < 2 or self.new_tokens < 2:
            raise ValueError(f"Prompt and answer must be two tokens or more, found {self.tokens} and {self.new_tokens}")
        if self.gpus < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError(f"gpus and layers must be 1 or more, found {self.gpus} and {self.layers}")
