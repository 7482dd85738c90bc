"""Ring attention: the plan of who sees what of a circulating block, and the scheme that computes with it."""

from ultralong.attention.ring.plan import circulating_ranges, own_segments, rectangles
from ultralong.attention.ring.ring import Ring

__all__ = ["Ring", "circulating_ranges", "own_segments", "rectangles"]
