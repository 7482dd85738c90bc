"""Options of the attention bench, and one row of its results.

Legend: H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from ultralong.utils.units import Tokens

SCHEMES = ("ulysses", "gathered", "ring")
HYBRIDS = ("hybrid-gathered", "hybrid-ring")


@dataclass(frozen=True)
class AttentionBench:
    """Options of the attention bench.

    Attributes:
        lengths: Row lengths in tokens.
        latency_length: A short length at which latency is measured, on idle GPUs; 0 leaves it out.
        schemes: Schemes, or "all"; `single` (one GPU) is always measured first.
        kernels: Names of kernels; "auto" is the fastest one for the call, "all" every one that is installed.
        meshes: Also measure the two hybrids over meshes of two levels, such as 2x4: the first number of groups, each of
            as many ranks as the second says, which split heads.
        documents: Also measure packed rows of this many masked documents of mixed length; 0 leaves them out.
        peers: Also measure other projects' attention where installed.
        check: Also report errors against float32.
        check_length: Longest row that is checked.
        check_heads: Query heads of the check, with kv heads in proportion: errors do not depend on their number, and
            float32 on a GPU takes long.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Head size.
        dtype: Name of a torch type.
        ranks: Processes; all GPUs by default, two on a CPU.
        head_chunks: Head chunks of Ulysses and of gathered keys; by default as `make_attention_context` chooses.
        repeats: Timed runs of each case at most.
        budget: Seconds of timed runs after which no further one is started.
    """

    lengths: tuple[Tokens, ...] = (131072, 524288)
    latency_length: Tokens = 8192
    schemes: tuple[str, ...] = ("all",)
    kernels: tuple[str, ...] = ("auto",)
    meshes: tuple[str, ...] = ()
    documents: int = 32
    peers: bool = False
    check: bool = False
    check_length: Tokens = 131072
    check_heads: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype: str = "bfloat16"
    ranks: int | None = None
    head_chunks: int | None = None
    repeats: int = 5
    budget: float = 20.0

    def __post_init__(self) -> None:
        unknown = set(self.schemes) - {"all", *SCHEMES}
        if unknown:
            raise ValueError(f"schemes must be among all, {', '.join(SCHEMES)}; found {', '.join(sorted(unknown))}")
        wrong = [mesh for mesh in self.meshes if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", mesh)]
        if wrong:
            raise ValueError(f"meshes are written as 2x4, found {', '.join(wrong)}")
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths must be positive, found {self.lengths}")

    def for_check(self) -> AttentionBench:
        """The same with the check's heads, and the default head chunks: those asked for may not split these heads."""
        heads = min(self.heads, self.check_heads)
        return replace(self, heads=heads, kv_heads=max(1, self.kv_heads * heads // self.heads), head_chunks=None)

    def for_this_machine(self) -> AttentionBench:
        """The same on a GPU; on a CPU small enough for one: at most 2,048 tokens, 8 heads of 32, float32."""
        import torch

        if torch.cuda.is_available():
            return self
        lengths = tuple(sorted({min(length, 2048) for length in self.lengths}))
        kv_heads = max(1, 8 * self.kv_heads // self.heads)
        return replace(
            self,
            lengths=lengths,
            latency_length=min(self.latency_length, 256),
            heads=8,
            kv_heads=kv_heads,
            documents=min(self.documents, 8),
            head_size=32,
            dtype="float32",
            ranks=self.ranks or 2,
            budget=min(self.budget, 2.0),
        )


@dataclass(frozen=True)
class AttentionResult:
    """One row of the results.

    Attributes:
        name: Scheme, `single`, or a peer.
        kernel: Name of the kernel that ran.
        tokens: Row length.
        packed: Whether it held documents that do not see each other.
        ranks: GPUs that shared the row.
        forward_ms: Forward pass, slowest rank, median.
        backward_ms: Backward pass, likewise.
        tflops: Useful TF/s per GPU, forward and backward.
        of_one: Its ratio to the same kernel's on one GPU, same documents.
        overhead_ms: Time beyond one GPU's time divided by the ranks.
        peak_gib: Most memory of any rank.
        errors: Relative error against float32 of output, dq, dk, dv, when checked.
        note: Why there are no numbers.
        begun: On an "idle" GPU (latency), or on one that was "busy" until the host had started the call (rate).
    """

    name: str
    kernel: str
    tokens: int
    packed: bool
    ranks: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflops: float | None = None
    of_one: float | None = None
    overhead_ms: float | None = None
    peak_gib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""
    begun: str = ""
