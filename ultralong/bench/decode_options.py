"""Options of the decoding bench."""

from __future__ import annotations

from dataclasses import dataclass

from ultralong.utils.units import Tokens

# As `ultralong.inference.decode_step.exchange`, which needs torch.
WAYS = ("auto", "direct", "gather", "symmetric")


@dataclass(frozen=True)
class DecodeBench:
    """Options of the decoding bench.

    Attributes:
        model: A model folder, a hub id, or a shape that the planner knows; weights are random in any case.
        lengths: Tokens of the single prompts.
        batch: Prompts that are answered together; 0 measures none.
        batch_tokens: Tokens of each of them.
        new_tokens: Tokens of each answer.
        gpus: Processes that share a single prompt.
        layers: Decoder layers to keep; by default all. A model cut short is named so in its rows.
        chunk: Tokens of one prefill pass of the sharded cache; by default 65,536 for each GPU.
        filled: Fill the cache with random keys and values in place of reading a prompt, which takes minutes at a
            million tokens; only the sharded cache is measured then.
        kv: Types of the sharded cache's keys and values to measure, of `bf16` and `fp8`.
        exchange: Ways in which the fused step's GPUs join their attention, of `direct` (each sends to each), `gather`
            (NCCL's all-gather), `symmetric` (each reads the others' memory) and `auto`, the default everywhere
            (`symmetric` where GPUs allow it, else `direct`; rows say which).
        fused_only: Leave out the step by the model's own code, which takes ten times as long.
        waiting: Measure every way of the sharded cache a first time with steps that are started when the host has
            read their token, not before.
    """

    model: str
    lengths: tuple[Tokens, ...] = (2048, 32768)
    batch: int = 16
    batch_tokens: Tokens = 1024
    new_tokens: int = 64
    gpus: int = 1
    layers: int | None = None
    chunk: Tokens | None = None
    filled: bool = False
    kv: tuple[str, ...] = ("bf16", "fp8")
    exchange: tuple[str, ...] = ("auto",)
    fused_only: bool = False
    waiting: bool = False

    def __post_init__(self) -> None:
        if min((*self.lengths, self.batch_tokens)) < 2 or self.new_tokens < 2:
            raise ValueError(
                f"Prompts and answers must be two tokens or more, found {list(self.lengths)}, {self.batch_tokens} and "
                f"{self.new_tokens}"
            )
        if not self.lengths and not self.batch:
            raise ValueError("There is nothing to measure: give --lengths or --batch.")
        if not self.kv or set(self.kv) - {"bf16", "fp8"}:
            raise ValueError(f"kv takes bf16 and fp8, found {' '.join(self.kv) or 'nothing'}")
        if not self.exchange or set(self.exchange) - set(WAYS):
            raise ValueError(f"exchange takes {', '.join(WAYS)}, found {' '.join(self.exchange) or 'nothing'}")
        if self.filled and self.batch:
            raise ValueError("A filled cache holds one prompt: give --batch 0 with --filled.")
        if self.gpus < 1 or self.batch < 0 or (self.layers is not None and self.layers < 1):
            raise ValueError(
                f"gpus and layers must be 1 or more, batch 0 or more, found {self.gpus}, {self.layers} and {self.batch}"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max((*self.lengths, self.batch_tokens)) + self.new_tokens
