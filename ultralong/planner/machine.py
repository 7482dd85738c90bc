"""A GPU in rates: measured by `ultralong bench rates`, or scaled from such a measurement by datasheets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultralong.attention.cost_model import H200, CostModel
from ultralong.utils.files import read_json
from ultralong.utils.units import GIB

# (relative speed of bfloat16 products, relative memory bandwidth, GiB of memory), from datasheets, over the H200's.
SCALED = {"h100": (1.0, 3.35 / 4.8, 79.1), "a100": (312 / 989, 2.04 / 4.8, 79.1)}
WRITE = "Measure this machine: ultralong bench rates --json FILE"


@dataclass(frozen=True)
class Machine:
    """Rates that a plan is calculated with. They are tables over sizes, read by interpolation in the size's logarithm.

    Attributes:
        name: What it is called in a plan.
        basis: "measured", or "estimated" where the rates were scaled from another machine's.
        memory: Bytes of one GPU.
        matmul: FLOP/s of bfloat16 products by size of the weight.
        latency: Seconds that an operation takes on the GPU however little it moves.
        bandwidth: Bytes/s that it moves beyond that.
        strided: Elements/s of elementwise operations on tensors of different layouts.
        attention: For kernel and head size, FLOP/s forward and backward by tokens.
        launch: Seconds to start an operation.
        update: Seconds that AdamW takes for a parameter.
        link: Bytes/s between host and GPU.
        costs: What attention over several GPUs costs, the same model that layouts are chosen with.
        peak: FLOP/s of the datasheet, which MFU refers to.
    """

    name: str
    basis: str
    memory: float
    matmul: tuple[tuple[float, float], ...]
    latency: float
    bandwidth: float
    strided: float
    attention: Mapping[tuple[str, int], tuple[tuple[float, float, float], ...]]
    launch: float
    update: float
    link: float
    costs: CostModel
    peak: float = 989e12

    def matmul_rate(self, size: float) -> float:
        """FLOP/s of products with a weight of `size`."""
        return _interpolate(self.matmul, size, 1)

    def traffic_seconds(self, operations: float, size: float, strided: float = 0.0) -> float:
        """Seconds of operations that move `size` bytes together, and of `strided` elements beside them."""
        return operations * self.latency + size / self.bandwidth + strided / self.strided

    def attention_rates(self, kernel: str, head_dim: int, tokens: int) -> tuple[float, float]:
        """FLOP/s of causal attention, forward and backward (counted as 2.5 times the forward's work).

        Where the kernel was measured at another head size only, its rates are scaled as another kernel's, which was
        measured at both.

        Args:
            kernel: A kernel's name; "auto" is the fastest that comes with torch.
            head_dim: Size of a head; the nearest one that was measured is used.
            tokens: Tokens of the row that the kernel sees.

        Raises:
            ValueError: The kernel was not measured on this machine.
        """
        names = sorted({name for name, _ in self.attention})
        wanted = "cudnn" if kernel == "auto" and "cudnn" in names else kernel
        wanted = names[0] if wanted == "auto" else wanted
        sizes = [size for name, size in self.attention if name == wanted]
        if not sizes:
            raise ValueError(
                f"No rates of the attention kernel {kernel!r} on {self.name}; there are: "
                f"{', '.join(names)}. Measure them: ultralong bench rates --json FILE, then "
                "plan with that file."
            )
        nearest = min((size for _, size in self.attention), key=lambda size: abs(size - head_dim))
        size = nearest if nearest in sizes else min(sizes, key=lambda size: abs(size - head_dim))
        rates = [_interpolate(self.attention[wanted, size], tokens, column) for column in (1, 2)]
        if size != nearest:
            other = next(name for name in names if {(name, size), (name, nearest)} <= self.attention.keys())
            for column in (1, 2):
                at = [_interpolate(self.attention[other, each], tokens, column) for each in (nearest, size)]
                rates[column - 1] *= at[0] / at[1]
        return rates[0], rates[1]


def load_machine(name: str | os.PathLike[str]) -> Machine:
    """A machine by name ("h200", "h100", "a100") or from a file that `ultralong.bench.rates` wrote.

    Raises:
        ValueError: Neither a name nor a file, or a file of something else.
    """
    if name in SCALED:
        return _scaled(str(name))
    path = Path(name)
    if not path.is_file():
        path = Path(str(resources.files("ultralong.planner").joinpath("machines", f"{name}.json")))
    if not path.is_file():
        raise ValueError(
            f"{name!r} is neither a known machine (h200, {', '.join(SCALED)}) nor a file of rates. {WRITE}"
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} holds no rates: it is no JSON. {WRITE}") from error
    try:
        return _parse(content["machine"], content["rates"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds no rates ({type(error).__name__}: {error}). {WRITE}") from error


def machine_here() -> Machine:
    """The known machine nearest to this process's GPU, with that GPU's memory; the H200 where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return load_machine("h200")
    name = torch.cuda.get_device_name()
    found = load_machine(next((known for known in SCALED if known.upper() in name), "h200"))
    return replace(found, memory=float(torch.cuda.get_device_properties().total_memory))


def _parse(facts: Mapping[str, Any], rates: Mapping[str, Sequence[Mapping[str, Any]]]) -> Machine:
    attention: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for row in rates["attention"]:
        if "forward_tflops" in row:
            attention.setdefault((row["kernel"], row["head_size"]), []).append(
                (row["tokens"], row["forward_tflops"] * 1e12, row["backward_tflops"] * 1e12)
            )
    latency, bandwidth = _latency_and_bandwidth(rates["traffic"])
    return Machine(
        name=facts["device"],
        basis="measured",
        memory=facts.get("memory_gib", 0.0) * GIB,
        matmul=tuple((row["size"], row["tflops"] * 1e12) for row in rates["matmul"]),
        latency=latency,
        bandwidth=bandwidth,
        strided=_strided(rates, bandwidth),
        attention={key: tuple(sorted(rows)) for key, rows in attention.items()},
        launch=rates["launch"][0]["seconds"],
        update=rates["update"][0]["seconds_per_parameter"],
        link=rates["link"][0]["gbps"] * 1e9 if "link" in rates else math.inf,
        costs=replace(
            H200,
            hardware=facts["device"],
            exchange=rates["exchange"][0]["gbps"] * 1e9 if "exchange" in rates else math.inf,
        ),
    )


def _scaled(name: str) -> Machine:
    """Another GPU, estimated from the H200's measured rates and both datasheets."""
    base = load_machine("h200")
    compute, bandwidth, memory = SCALED[name]
    costs = replace(base.costs, hardware=name.upper(), attention=base.costs.attention * compute)
    return replace(
        base,
        name=name.upper(),
        basis="estimated",
        memory=memory * GIB,
        peak=base.peak * compute,
        matmul=tuple((size, rate * compute) for size, rate in base.matmul),
        bandwidth=base.bandwidth * bandwidth,
        strided=base.strided * compute,
        attention={
            key: tuple((tokens, forward * compute, backward * compute) for tokens, forward, backward in rows)
            for key, rows in base.attention.items()
        },
        update=base.update / bandwidth,
        costs=costs,
    )


def _strided(rates: Mapping[str, Sequence[Mapping[str, Any]]], bandwidth: float) -> float:
    """Elements/s of strided operations; of a file from before they were measured in proportion to the H200's."""
    if "strided" in rates:
        return float(rates["strided"][0]["elements_per_second"])
    known = load_machine("h200")
    return known.strided * bandwidth / known.bandwidth


def _latency_and_bandwidth(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The straight line of time over bytes through the smallest and the largest operation that were measured."""
    small, large = (min(rows, key=lambda row: row["bytes"]), max(rows, key=lambda row: row["bytes"]))
    times = [row["bytes"] / row["gbps"] / 1e9 for row in (small, large)]
    if small is large:
        return 0.0, small["gbps"] * 1e9
    slope = (times[1] - times[0]) / (large["bytes"] - small["bytes"])
    return max(0.0, times[0] - slope * small["bytes"]), 1 / slope


def _interpolate(table: Sequence[Sequence[float]], at: float, column: int) -> float:
    """Linear in the logarithm of the first column, and flat beyond its ends."""
    if at <= table[0][0]:
        return table[0][column]
    for low, high in pairwise(table):
        if at <= high[0]:
            share = math.log(at / low[0]) / math.log(high[0] / low[0])
            return low[column] + share * (high[column] - low[column])
    return table[-1][column]
