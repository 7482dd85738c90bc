"""The settings of a rotary position scaling: one frozen dataclass, checked when it is made.

`ultralong.rope` turns it into tables and into what transformers reads; its docstring states the conventions.
"""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
RAMPS = ("dimension", "rotations")
NEEDS_WINDOW = ("dynamic", "yarn", "llama3", "longrope")
HAS_ATTENTION_FACTOR = ("yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """Everything that determines a rotary table.

    Attributes:
        method: One of `METHODS`. "linear" is position interpolation, "ntk" the static change of base.
        head_dim: Size of one attention head, D.
        theta: Base of the unscaled frequencies.
        factor: Window after scaling over window before it, of the unscaled model: to scale a scaled model replaces its
            factor, it never multiplies.
        original_window: Tokens the unscaled model was pretrained on, L.
        alpha: Turns within L below which a pair is fully slowed down (`beta_slow`, `low_freq_factor`).
        beta: Turns within L above which a pair is left alone (`beta_fast`, `high_freq_factor`).
        ramp: Between alpha and beta, "rotations" blends linearly in the number of turns (the paper's NTK-by-parts),
            "dimension" linearly in the pair's index (YaRN's released code, transformers, vLLM). Only read for "yarn";
            "llama3" always uses "rotations".
        truncate: With the "dimension" ramp, round its ends outwards to whole pairs, as transformers does by default.
        attention_factor: None for the method's own (`attention_factor`), 1.0 for off, or a number.
        short_factors: LongRoPE's divisors of the R/2 frequencies for inputs up to L tokens.
        long_factors: LongRoPE's divisors for longer inputs.
        partial_rotary_factor: Share of the head that is rotated, from its start.

    Raises:
        ValueError: A value is out of its range or the method lacks one that it needs.
    """

    method: str
    head_dim: int
    theta: float
    factor: float = 1.0
    original_window: int | None = None
    alpha: float = 1.0
    beta: float = 4.0
    ramp: str = "dimension"
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"RoPE method {self.method!r} is unknown. Use one of: {', '.join(METHODS)}.")
        require(self.ramp in RAMPS, f"RoPE ramp {self.ramp!r} is unknown. Use one of: {', '.join(RAMPS)}.")
        require(
            self.rotary_dim >= 4 and self.rotary_dim % 2 == 0,
            f"RoPE turns pairs and needs an even number of at least 4 rotated sizes a head; head size "
            f"{self.head_dim} with partial_rotary_factor {self.partial_rotary_factor} gives {self.rotary_dim}.",
        )
        require(self.theta > 1.0, f"The RoPE base (theta) must be above 1, found {self.theta}.")
        require(self.factor >= 1.0, f"A RoPE factor stretches the window and is at least 1, found {self.factor}.")
        require(0.0 < self.alpha < self.beta, f"The ramp needs 0 < alpha < beta, found {self.alpha} and {self.beta}.")
        if self.method in NEEDS_WINDOW:
            require(
                self.original_window is not None and self.original_window > 1,
                f"RoPE method {self.method!r} needs original_window, the tokens the unscaled model was pretrained "
                f"on; found {self.original_window}.",
            )
        self._check_attention_factor()
        if self.method == "longrope":
            self._check_factor_lists()

    def _check_attention_factor(self) -> None:
        given = self.attention_factor
        require(given is None or given > 0.0, f"attention_factor must be above 0, found {given}. 1.0 turns it off.")
        require(
            given in (None, 1.0) or self.method in HAS_ATTENTION_FACTOR,
            f"RoPE method {self.method!r} has no attention factor, but {given} was given: only "
            f"{' and '.join(HAS_ATTENTION_FACTOR)} have one. Leave it out or change the method.",
        )

    def _check_factor_lists(self) -> None:
        for name in ("short_factors", "long_factors"):
            values = getattr(self, name)
            found = "nothing" if values is None else f"{len(values)} numbers"
            require(
                values is not None and len(values) == self.rotary_dim // 2 and min(values) > 0.0,
                f"longrope needs {name}: {self.rotary_dim // 2} positive numbers, one a pair; found {found}.",
            )

    @property
    def rotary_dim(self) -> int:
        """Rotated sizes of a head, R."""
        return int(self.head_dim * self.partial_rotary_factor)


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)
