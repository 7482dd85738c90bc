"""Which way of sharing rows a run takes where its config says auto, and why, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ultralong.data.rows.row_checks import TOGETHER
from ultralong.planner.machine import Machine, load_machine
from ultralong.planner.shapes import check_countable, planned_model, shape_of
from ultralong.planner.sharing.priced import Asked, Price, one_row_passes, priced
from ultralong.training.config import TrainConfig
from ultralong.training.parallel_config import ParallelConfig
from ultralong.training.preflight import preflight
from ultralong.training.sharing import SharingDecision, named
from ultralong.utils.units import GIB

MARGIN = 0.03  # of a step's seconds that dynamic sharing has to save: about what plans are wrong by
HOST_GPUS = 8  # of a host, where it is not said
MIXED = "rows differ in length or document mask, which only dynamic sharing takes"


@dataclass(frozen=True)
class Choice:
    """One way of sharing rows.

    Attributes:
        parallel: Its settings.
        refused: Why no run takes it; empty for one that can be taken.
        price: What it takes; None where that isn't known.
        uncounted: Why the planner can't count what it takes, where that is so.
    """

    parallel: ParallelConfig
    refused: str
    price: Price | None
    uncounted: str = ""

    def __str__(self) -> str:
        """As a sentence names it."""
        return named(self.parallel.shared_by, self.parallel.dynamic)

    def fits(self, budget: float) -> bool:
        """Whether it fits in so many bytes of a GPU, as far as that can be counted."""
        return self.price is None or self.price.gpu_bytes <= budget

    def to_dict(self) -> dict[str, object]:
        """Plain values, for a file."""
        numbers: dict[str, object] = {}
        if self.price is not None:
            numbers = {"seconds": round(self.price.seconds, 6), "gpu_gib": round(self.price.gpu_bytes / GIB, 3)}
        return {
            "dynamic_context_parallel": self.parallel.dynamic,
            "context_parallel_size": self.parallel.shared_by,
            **numbers,
            **{name: text for name in ("refused", "uncounted") if (text := getattr(self, name))},
        }


def decide_sharing(
    config: TrainConfig,
    gpus: int,
    *,
    machine: Machine | str = "h200",
    host_gpus: int = HOST_GPUS,
    tokens: int | None = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    fit: bool = False,
    resume: bool = True,
    answers: bool = False,
    planned: bool = False,
) -> SharingDecision:
    """Decide how the rows of a run are shared, from its rows, its GPUs and the planner's count.

    Dynamic sharing is taken where the trainer takes it for this config, it fits, and it is planned to be faster than
    the fastest fixed degree that fits by more than 3%; or where every fixed degree is refused, as for rows of several
    lengths. Of several degrees the one with the shortest step is taken, inside a host if one fits there: the plan's
    exchange is that of GPUs of one host.

    Args:
        config: The run, with auto in one setting or both.
        gpus: Its processes.
        machine: The GPU, by name or with rates of its own.
        host_gpus: GPUs of a host.
        tokens: Tokens of a row, where others are planned than those that are packed.
        gpu_memory: GiB of one GPU; by default the machine's.
        host_memory: GiB of host memory for one process; used with `fit` only.
        fit: Give each way the memory plan under which it is fastest.
        resume: Whether a run in the folder may be resumed.
        answers: Rows have to be of conversations (SFT).
        planned: Model and rows need not be there yet, and the run's folder is not looked at.

    Returns:
        The decision. It takes some seconds for each way, and no GPU.

    Raises:
        ValueError: Every way is refused; says why.
    """
    machine = load_machine(machine) if isinstance(machine, str) else machine
    shape = planned_model(config.model, config.base_model)[0] if planned else None
    told = list[tuple[ParallelConfig, list[str]]]()
    for parallel in config.parallel.choices(gpus):
        run = replace(config, parallel=parallel)
        found = preflight(run, gpus, resume=resume, answers=answers, planned=planned, shape=shape)
        told.append((parallel, [finding.text for finding in found if not finding.good]))
    if all(wrong for _, wrong in told):
        raise ValueError(_none_left(told))
    budget = machine.memory if gpu_memory is None else gpu_memory * GIB
    host = None if host_memory is None else host_memory * GIB
    asked = _asked(config, gpus, machine, budget, host, tokens, fit)
    packed = all((Path(source.rows) / "manifest.json").is_file() for source in config.data)
    weighed = packed or not any(not wrong and not way.dynamic for way, wrong in told)
    ways = [(way, " Also: ".join(wrong)) for way, wrong in told if weighed or not way.dynamic]
    choices = [_choice(asked, config, *way) for way in ways if way[0].shared_by <= host_gpus]
    if not any(not each.refused and each.fits(budget) for each in choices):
        choices += [_choice(asked, config, *way) for way in ways if way[0].shared_by > host_gpus]
    taken = _taken(choices, budget)
    longest = max((each.price.tokens for each in choices if each.price is not None), default=0)
    # The machine by name: on one that is not known, or without a GPU, these are the H200's seconds.
    where = f"; longest row {longest:,} on {gpus} x {machine.name}" if longest else ""
    where += "" if packed else "; not all rows are packed yet, so this is decided again once they are"
    return SharingDecision(
        taken.parallel.shared_by,
        taken.parallel.dynamic,
        gpus,
        machine.name,
        f"{taken}{_because(taken, choices, budget)}{where}.",
        tuple(each.to_dict() for each in choices),
    )


def _asked(
    config: TrainConfig,
    gpus: int,
    machine: Machine,
    budget: float,
    host: float | None,
    tokens: int | None,
    fit: bool,
) -> Asked | str:
    """What is priced; why the planner can't count the model, where that is so."""
    model, _ = planned_model(config.model, config.base_model)
    try:
        check_countable(model)
        return Asked(config, gpus, model, shape_of(model), machine, budget, host, tokens, fit)
    except ValueError as error:
        return str(error)


def _none_left(told: list[tuple[ParallelConfig, list[str]]]) -> str:
    """Why every way is refused: what is wrong with all of them; else of each kind the one with the least wrong."""
    if everywhere := [text for text in told[0][1] if all(text in wrong for _, wrong in told)]:
        return " Also: ".join(everywhere)
    if any(TOGETHER in " ".join(wrong) for _, wrong in told) and any(way.dynamic for way, _ in told):
        told = [each for each in told if each[0].dynamic]  # that a fixed degree is refused was to be expected
        _, least = min(told, key=lambda each: len(each[1]))
        return " Also: ".join(least)
    said = []
    for dynamic in (False, True):
        if kind := [(way, wrong) for way, wrong in told if way.dynamic == dynamic]:
            way, wrong = min(kind, key=lambda each: len(each[1]))
            said.append(f"{Choice(way, '', None)}: {' Also: '.join(wrong)}")
    return f"Rows can't be shared in any way. With {' With '.join(said)}"


def _choice(asked: Asked | str, config: TrainConfig, parallel: ParallelConfig, refused: str) -> Choice:
    """A way with its price; of a refused one only that of mixed rows at a fixed degree, to compare with."""
    if isinstance(asked, str):
        return Choice(parallel, refused, None, asked)
    asked = replace(asked, config=replace(config, parallel=parallel))
    mixed = bool(refused) and not parallel.dynamic and TOGETHER in refused
    try:
        price = priced(asked) if not refused else one_row_passes(asked) if mixed else None
    except ValueError as error:  # no rates of its kernel, say
        return Choice(parallel, MIXED if mixed else refused, None, str(error))
    return Choice(parallel, MIXED if mixed else refused, price)


def _taken(choices: list[Choice], budget: float) -> Choice:
    """The fastest that fits and is not refused; the least in memory where none fits, all GPUs where none is counted."""
    open_ways = [each for each in choices if not each.refused]
    counted = [each for each in open_ways if each.price is not None]
    if not counted:
        first = [each for each in open_ways if not each.parallel.dynamic] or open_ways
        return max(first, key=lambda each: each.parallel.shared_by)
    fitting = [each for each in counted if each.fits(budget)]
    if not fitting:
        return min(counted, key=lambda each: each.price.gpu_bytes if each.price else 0.0)
    fixed, dynamic = (
        min((each for each in fitting if each.parallel.dynamic == way), key=_seconds, default=None)
        for way in (False, True)
    )
    if fixed is None or dynamic is None:
        found = fixed or dynamic
        assert found is not None
        return found
    return dynamic if _seconds(dynamic) < (1 - MARGIN) * _seconds(fixed) else fixed


def _seconds(choice: Choice) -> float:
    return choice.price.seconds if choice.price is not None else float("inf")


def _because(taken: Choice, choices: list[Choice], budget: float) -> str:
    """The rest of the sentence: seconds planned, those of the best other way, what was refused or does not fit."""
    if taken.price is None:
        return f", as what it takes can't be counted: {taken.uncounted.rstrip('.')}"
    others = [each for each in choices if each is not taken and each.price is not None and each.fits(budget)]
    others = [each for each in others if each.parallel.dynamic != taken.parallel.dynamic] or others
    said = [f": step {_seconds(taken):.3g} s planned"]
    if others:
        best = min(others, key=_seconds)
        said[0] += f" against {_seconds(best):.3g} s {'of' if best.parallel.dynamic else 'at'} {best}"
        if best.refused:
            said.append(best.refused)
        elif best.parallel.dynamic and _seconds(best) < _seconds(taken):
            said.append(f"dynamic sharing is taken where it is more than {MARGIN:.0%} faster")
    if not taken.fits(budget):
        said.append(f"none fits in {budget / GIB:.1f} GiB, and this needs the least, {taken.price.gpu_bytes / GIB:.1f}")
    faster = [
        each for each in choices if not each.refused and not each.fits(budget) and _seconds(each) < _seconds(taken)
    ]
    for each in sorted(faster, key=_seconds)[:1]:
        if taken.fits(budget) and each.price is not None:
            needed = f"{each.price.gpu_bytes / GIB:.1f} GiB of {budget / GIB:.1f}"
            said.append(f"{each} would take {_seconds(each):.3g} s and needs {needed}")
    other_way = [each for each in choices if each.parallel.dynamic != taken.parallel.dynamic]
    if other_way and all(each.refused for each in other_way) and not any(each.price for each in other_way):
        kind = "a fixed degree" if taken.parallel.dynamic else "dynamic sharing"
        said.append(f"{kind} is refused: {other_way[0].refused.rstrip('.')}")
    return "; ".join(said)
