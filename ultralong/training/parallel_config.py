"""How a training run's processes share its work: the settings under `parallel`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ultralong.utils.units import Tokens

AUTO: Literal["auto"] = "auto"
DECIDED_BY = (
    "the planner decides it (ultralong train and sft do that, and ultralong.planner.decide_sharing), or set it yourself"
)


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share the work: context-parallel groups share a row, groups work side by side.

    Attributes:
        context_parallel_size: Processes that share one row (context parallelism, also called sequence parallelism);
            the processes of a run must be a multiple. auto: as many as the planner finds fastest of those with which
            the run fits in memory, when it starts.
        dynamic_context_parallel: Each row is shared by 1, 2, 4 ... of those processes, as its work asks for; rows of
            different lengths and masks may be mixed, and those of a step are laid end to end in packs of equal work.
            auto: where the planner finds that clearly faster for the rows that are there, or a fixed degree is refused.
        max_tokens_per_rank: Most tokens of a pack on one process; None is the longest row's share.
        fsdp_shard_degree: Processes over which FSDP2 shards the parameters, their gradients and the optimizer's
            states, whatever rows they work on; the processes of a run must be a multiple, and each further set of that
            many is a replica. 1 is allowed: nothing is sharded then, but parameters are computed with in `dtype` as
            FSDP2 does. None: no FSDP, every process has everything.
        reshard_after_forward: Free a layer's gathered parameters after its forward pass and gather them again for the
            backward pass; false keeps them in between.
        scheme: Attention scheme, see `ultralong.attention`; auto chooses and says why.
        kernel: Attention kernel; auto takes the fastest that is present and right for the shape.
        head_chunks: Chunks of heads that the scheme, or the backward pass of attention on one GPU, works through one
            after another: more make its buffers smaller and cost a little; None is one.
        timeout_minutes: A run of several ranks without progress for this long ends, and says what each waits for.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "sequence": "context_parallel_size",
        "shard": "fsdp_shard_degree",
        "reshard": "reshard_after_forward",
        "stages": "head_chunks",
    }

    context_parallel_size: int | Literal["auto"] = 1
    dynamic_context_parallel: bool | Literal["auto"] = False
    max_tokens_per_rank: Tokens | None = None
    fsdp_shard_degree: int | None = None
    reshard_after_forward: bool = True
    scheme: str = "auto"
    kernel: str = "auto"
    head_chunks: int | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        degree, size = self.fsdp_shard_degree, self.context_parallel_size
        if (most := self.max_tokens_per_rank) is not None and (most < 1 or not self.dynamic_context_parallel):
            raise ValueError(
                f"max_tokens_per_rank ({most}) is 1 or more, and for dynamic_context_parallel: true (or auto) only."
            )
        least = 1 if size == AUTO else size
        if least < 1 or (degree is not None and degree < 1) or not 0 < self.timeout_minutes < 1e6:
            names = "context_parallel_size and fsdp_shard_degree must be 1 or more and timeout_minutes above 0"
            raise ValueError(f"{names}, found {self}.")

    @property
    def undecided(self) -> bool:
        """Whether the planner still has to say how rows are shared."""
        return AUTO in (self.context_parallel_size, self.dynamic_context_parallel)

    @property
    def shared_by(self) -> int:
        """`context_parallel_size` as a number.

        Raises:
            ValueError: It is auto.
        """
        if self.context_parallel_size == AUTO:
            raise ValueError(f"parallel.context_parallel_size is auto: {DECIDED_BY}.")
        return self.context_parallel_size

    @property
    def dynamic(self) -> bool:
        """`dynamic_context_parallel` as true or false.

        Raises:
            ValueError: It is auto.
        """
        if self.dynamic_context_parallel == AUTO:
            raise ValueError(f"parallel.dynamic_context_parallel is auto: {DECIDED_BY}.")
        return self.dynamic_context_parallel

    def choices(self, processes: int) -> list[ParallelConfig]:
        """What auto leaves to choose from on so many processes, fixed degrees first; itself alone without auto.

        A run may refuse some of them.
        """
        size, dynamic = self.context_parallel_size, self.dynamic_context_parallel
        sizes = [n for n in range(1, processes + 1) if processes % n == 0] if size == AUTO else [size]
        return [self.decided(n, way) for way in ((False, True) if dynamic == AUTO else (dynamic,)) for n in sizes]

    def decided(self, size: int, dynamic: bool) -> ParallelConfig:
        """The same with these two settings; a pack's most tokens are of dynamic sharing only."""
        most = self.max_tokens_per_rank if dynamic else None
        return replace(self, context_parallel_size=size, dynamic_context_parallel=dynamic, max_tokens_per_rank=most)
