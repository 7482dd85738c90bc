"""What a plan is asked with: numbers that have a sense."""

from __future__ import annotations

# The largest numbers that are taken for meant: a thousand times what is built or trained today.
LARGEST = {"gpus": 2**20, "tokens": 2**36, "gpu_memory": 2**20, "host_memory": 2**24, "price": 1e9}
UNITS = {"gpu_memory": " GiB", "host_memory": " GiB"}


def check_numbers(**numbers: float | None) -> None:
    """Refuse numbers without sense; None is a number that was not given.

    Args:
        **numbers: Any of the keys of `LARGEST`.

    Raises:
        ValueError: One is not finite, is zero or less (a price or a host's memory may be zero), or is too large.
    """
    for name, value in numbers.items():
        if value is None:
            continue
        may_be_zero = name in ("price", "host_memory")
        low = "0" if may_be_zero else "above 0" if name == "gpu_memory" else "1"
        if not 0 <= value <= LARGEST[name] or (value == 0 and not may_be_zero):  # a NaN is in no range
            shown = _shown(value)
            raise ValueError(
                f"{name} must be {'from ' if low != 'above 0' else ''}{low} to {LARGEST[name]:,}{UNITS.get(name, '')}, "
                f"found {shown}."
            )


def _shown(value: float) -> str:
    """A number as a message shows it: an integer may have thousands of digits, and more than a float can hold."""
    if isinstance(value, int) and abs(value) >= 10**300:
        return f"a number of {value.bit_length()} bits"
    return f"{value:,}" if abs(value) < 1e15 else f"{value:.3g}"
