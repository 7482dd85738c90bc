"""Units that more than one room counts in."""

from __future__ import annotations

GIB = 2**30  # bytes
