"""What a plan is asked with: numbers that have a sense, and GPUs that the trainer would accept."""

from __future__ import annotations

from ultralong.training.config import TrainConfig

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


def check_gpus(config: TrainConfig, gpus: int) -> None:
    """Refuse a number of GPUs that the trainer would refuse as a number of processes.

    Raises:
        ValueError: It is no multiple of the GPUs that share a row or the parameters, or the rows of a step can't be
            divided over the groups.
    """
    size, degree = config.parallel.context_parallel_size, config.parallel.fsdp_shard_degree
    for name, count in (("context_parallel_size", size), ("fsdp_shard_degree", degree or 1)):
        if gpus % count:
            divisor = max(d for d in range(1, count + 1) if gpus % d == 0)
            raise ValueError(
                f"{gpus} GPUs are not a multiple of parallel.{name} ({count}). Plan with a multiple of it, or set "
                f"parallel.{name} to a divisor of {gpus}, such as {divisor}."
            )
    groups = gpus // size
    if config.global_batch_size % (groups * config.micro_batch_size):
        raise ValueError(
            f"global_batch_size ({config.global_batch_size}) is not a multiple of {groups} groups of GPUs x "
            f"micro_batch_size ({config.micro_batch_size})."
        )
