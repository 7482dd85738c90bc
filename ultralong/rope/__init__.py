"""Rotary position scaling: each method as one pure function, and what a model's config says of it."""

from ultralong.rope.config import declared_window
from ultralong.rope.frequencies import (
    METHODS,
    RopeScaling,
    attention_factor,
    from_config,
    inverse_frequencies,
    pair_counts,
    rope_parameters,
    wavelengths,
    window_of,
)

__all__ = [
    "METHODS",
    "RopeScaling",
    "attention_factor",
    "declared_window",
    "from_config",
    "inverse_frequencies",
    "pair_counts",
    "rope_parameters",
    "wavelengths",
    "window_of",
]
