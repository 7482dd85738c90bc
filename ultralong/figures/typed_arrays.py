"""Long lists of numbers in a figure's JSON as typed arrays, which plotly.js reads (its `dtype` and `bdata`).

A saved notebook is indented: a list has a line and a dozen spaces for each of its numbers. Written as bytes the same
numbers take a fifth of that, and the figure is the same.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

NUMBERS = ("x", "y", "z", "array", "arrayminus")  # what of a trace may be so long
LEAST = 12  # numbers of a list that is worth it
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4")  # those of plotly.js, the smallest first
DIGITS = 1e-6  # what float32 may change, of a number and of the distance between the smallest and the largest


def compact(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a figure with its long lists of numbers as typed arrays, those of its frames too; changed in place.

    Args:
        content: What `json.loads(figure.to_json())` gives.
    """
    for traces in (content.get("data", []), *(frame.get("data", []) for frame in content.get("frames", []))):
        for trace in traces:
            for holder in (trace, trace.get("error_x", {}), trace.get("error_y", {})):
                for name in NUMBERS:
                    if isinstance(values := holder.get(name), list) and (array := _numbers(values)) is not None:
                        holder[name] = _typed(array)
    return content


def _numbers(values: list[Any]) -> np.ndarray | None:
    """The list as an array with its gaps as nan, or None where it is short, holds else, or has unequal rows."""
    items = np.asarray(values, dtype=object)
    kinds = set(map(type, items.flat))
    if items.size < LEAST or not kinds <= {int, float, type(None)} or kinds == {type(None)}:
        return None
    if kinds != {int}:
        return items.astype(float)
    return items.astype(np.int64) if max(map(abs, items.flat)) < 2**53 else None


def _typed(array: np.ndarray) -> dict[str, str]:
    name = _dtype(array)
    # Bytes in the order that plotly.js reads, on any machine.
    data = np.ascontiguousarray(array, dtype=f"<{name}").tobytes()
    found = {"dtype": name, "bdata": base64.b64encode(data).decode()}
    return found if array.ndim == 1 else found | {"shape": ", ".join(map(str, array.shape))}


def _dtype(array: np.ndarray) -> str:
    """The smallest type that holds the numbers: whole ones exactly, others to `DIGITS`, far below a pixel."""
    if array.dtype.kind != "f":
        ranges = ((name, np.iinfo(name)) for name in INTEGERS)
        return next((name for name, each in ranges if each.min <= array.min() and array.max() <= each.max), "f8")
    known = array[~np.isnan(array)]
    whole = (known == np.rint(known)).all()
    with np.errstate(all="ignore"):
        off = np.abs(known.astype("f4").astype("f8") - known)
        # An axis may begin far from zero: of times in seconds since 1970, float32 tells no minute from the next.
        near = (off <= (0 if whole else DIGITS * np.minimum(np.abs(known), np.ptp(known)))).all()
    return "f4" if near else "f8"
