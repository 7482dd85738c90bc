"""What attention over several GPUs costs, by a few rates of the hardware: one model for layouts and for the planner.

Legend: H query heads, K kv heads, D head size.

Layouts and schemes are compared in query-key pairs of one layer, both passes together: the unit of the work itself. The
planner (`ultralong.planner`) takes seconds from the same rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

FLOP_PER_PAIR = 14  # times H D: 4 forward, 10 backward
BYTES_PER_TOKEN = 16  # times K D: K and V in 2 bytes, once in each pass, and their gradients in 4
HEADS_PER_KV_HEAD = 4
HEADS, HEAD_SIZE = 32, 128  # of the layer that a call's and an exchange's seconds are compared with


@dataclass(frozen=True)
class CostModel:
    """Rates of a GPU and of its links to the others of its host.

    Attributes:
        hardware: What the rates were measured on.
        attention: FLOP/s of attention, both passes together.
        exchange: Bytes/s that a GPU receives from the others.
        call: Seconds of a kernel call's start and end, where they overlap with no other call's.
        exchange_start: Seconds of any exchange at all in a layer, however few tokens it is for.
    """

    hardware: str
    attention: float
    exchange: float
    call: float
    exchange_start: float

    @cached_property
    def pairs_per_token(self) -> int:
        """A key and value from another rank: their bytes, and as much time again for the copies into place."""
        seconds = 2 * BYTES_PER_TOKEN / self.exchange
        return _one_digit(seconds * self.attention / (FLOP_PER_PAIR * HEADS_PER_KV_HEAD))

    @cached_property
    def pairs_per_call(self) -> int:
        """A kernel call's start and end."""
        return self._pairs(self.call)

    @cached_property
    def pairs_per_exchange(self) -> int:
        """Any exchange at all."""
        return self._pairs(self.exchange_start)

    def _pairs(self, seconds: float) -> int:
        return _one_digit(seconds * self.attention / (FLOP_PER_PAIR * HEADS * HEAD_SIZE))


def _one_digit(count: float) -> int:
    """Rounded to one digit, which is as well as one set of rates holds for all shapes and kernels."""
    return int(float(f"{count:.0e}"))


# Measured with flash-attn 4 (notebooks/results/design_measurements.md, "Balance"; planner/machines/h200.json). Layouts
# are chosen with these on any GPU, so that a row is shared out alike everywhere.
H200 = CostModel("NVIDIA H200", attention=600e12, exchange=326e9, call=0.05e-3, exchange_start=0.5e-3)
