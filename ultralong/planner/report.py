"""A plan as lines, each with what it says, how much, and whether that was measured or estimated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ultralong.utils.units import GIB

PLACES = {
    "gpu": "GPU memory, each",
    "host": "Host memory of the process that saves",
    "step": "Seconds of a step",
    "run": "Whole run",
}


@dataclass(frozen=True)
class PlanLine:
    """One item of a plan.

    Attributes:
        place: "gpu", "host", "step" or "run".
        name: What it is.
        value: Bytes for memory, seconds for a step, and `unit` for the run.
        basis: "measured" where it rests on a rate measured on such a machine, else "estimated".
        unit: Unit of `value`.
        counts: Whether it is part of the place's total; False for what another line holds already.
    """

    place: str
    name: str
    value: float
    basis: str
    unit: str
    counts: bool = True

    def __str__(self) -> str:
        """One line of a table."""
        value, unit = (self.value / GIB, "GiB") if self.unit == "bytes" else (self.value, self.unit)
        name = self.name if self.counts else f"  of which {self.name}"
        basis = "measured rates" if self.basis == "measured" else self.basis
        return f"  {name:60}{value:12,.2f} {unit:12}{basis}"


@dataclass(frozen=True)
class Plan:
    """What a run will take, before it starts.

    Attributes:
        model: Name of the model.
        parameters: Of the model.
        tokens: Tokens of a row.
        gpus: GPUs of the run.
        machine: Name of the GPU.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of a host for one process; None when not known.
        lines: Its items.
        memory: The run's memory settings, as given or chosen.
        mfu: Causal model FLOP/s over the datasheet's.
        longest: Most tokens of a row that fit into the GPUs' memory.
        advice: What to change, with the figure that would result; empty when everything fits.
        assumed: What is assumed where there are no packed rows, and what to do about it; empty when there are.
        attention: How a row's attention is shared and computed, in words.
        sharing: How rows are shared and why, where the config leaves that to the planner; empty otherwise.
    """

    model: str
    parameters: int
    tokens: int
    gpus: int
    machine: str
    gpu_memory: float
    host_memory: float | None
    lines: tuple[PlanLine, ...]
    memory: dict[str, Any]
    mfu: float
    longest: int
    advice: tuple[str, ...]
    assumed: str = ""
    attention: str = ""
    sharing: str = ""

    def total(self, place: str) -> float:
        """Sum of a place's lines."""
        return sum(line.value for line in self.lines if line.place == place and line.counts)

    @property
    def allocated(self) -> float:
        """Bytes that tensors take on each GPU at the worst moment."""
        return sum(line.value for line in self.lines if line.place == "gpu" and line.name.startswith("tensors:"))

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one optimizer step."""
        return self.total("step")

    @property
    def fits(self) -> bool:
        """Whether both memories are enough."""
        return not self.advice

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the names that measured rows use after `planned_`."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "gpus": self.gpus,
            "machine": self.machine,
            "gpu_memory_gib": round(self.gpu_memory / GIB, 2),
            "planned_seconds_per_step": round(self.seconds_per_step, 4),
            "planned_mfu_causal": round(self.mfu, 4),
            "planned_peak_gpu_gib": round(self.allocated / GIB, 3),
            "planned_total_gpu_gib": round(self.total("gpu") / GIB, 3),
            "planned_peak_host_gib": round(self.total("host") / GIB, 3),
            "planned_longest_row": self.longest,
            "memory": self.memory,
            "attention": self.attention,
            **({"sharing": self.sharing} if self.sharing else {}),
            "fits": self.fits,
            "advice": list(self.advice),
            "lines": [asdict(line) for line in self.lines],
        }

    def __str__(self) -> str:
        """The plan as text."""
        parts = [
            f"{self.model}: {self.parameters / 1e9:.2f} billion parameters, rows of {self.tokens:,} tokens, "
            f"{self.gpus} x {self.machine}"
        ]
        sharing = f"Rows are shared as planned (auto): {self.sharing}" if self.sharing else ""
        parts += [text for text in (sharing, self.attention, self.assumed) if text]
        for place, title in PLACES.items():
            lines = [line for line in self.lines if line.place == place]
            if lines:
                parts += ["", title, *map(str, lines)]
            if place in ("gpu", "host") and lines:
                limit = self.gpu_memory if place == "gpu" else self.host_memory
                there = f" of {limit / GIB:,.1f}" if limit else ""
                parts.append(f"  {'total':60}{self.total(place) / GIB:12,.2f}{there} GiB")
            elif place == "step":
                parts.append(
                    f"  {'total':60}{self.seconds_per_step:12,.2f} s, {self.mfu:.1%} MFU (causal, no "
                    "recomputation counted)"
                )
        chosen = ", ".join(f"{name}: {str(value).lower()}" for name, value in self.memory.items())
        parts += ["", f"memory: {{{chosen}}}"]
        parts += [
            "",
            "measured rates: computed from rates measured on such a GPU; estimated: counted, or scaled by datasheets",
            f"Longest row that fits: {self.longest:,} tokens",
        ]
        parts += ["", "It does not fit:", *(f"* {text}" for text in self.advice)] if self.advice else ["This run fits."]
        return "\n".join(parts)
