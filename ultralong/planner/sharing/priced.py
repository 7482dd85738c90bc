"""What one way of sharing rows takes: seconds of a step and bytes of a GPU, also of mixed rows at a fixed degree.

No run takes rows of several lengths at a fixed degree. What it would take is planned all the same, for the comparison
and for the bench, which measures it: each row in a pass of its own, read by all GPUs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from ultralong.planner.autotune import autotune_memory
from ultralong.planner.machine import Machine
from ultralong.planner.memory import gpu_memory, gpu_total
from ultralong.planner.rows import SAMPLED_STEPS, PlannedPacks, PlannedRows, middles, planned_packs, planned_rows
from ultralong.planner.shapes import Shape
from ultralong.planner.step_time import step_time
from ultralong.planner.workload import Workload
from ultralong.rope import declared_window
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.throughput import query_key_pairs

ONCE = ("AdamW", "gradient clipping", "sum of gradients over GPUs")  # of a step, however many passes it has
SEEN = 16  # rows of one kind whose boundaries are looked at, about


@dataclass(frozen=True)
class Asked:
    """A run whose ways of sharing rows are planned, and where.

    Attributes:
        config: The run, its way of sharing aside.
        gpus: Its processes.
        model: The model's config.
        shape: The model in numbers.
        machine: The GPU.
        budget: Bytes of one GPU.
        host: Bytes of host memory for one process; None where it is not known.
        tokens: Tokens of a row, where others are planned than those that are packed.
        fit: Whether each way gets the memory plan under which it is fastest.
    """

    config: TrainConfig
    gpus: int
    model: PreTrainedConfig
    shape: Shape
    machine: Machine
    budget: float
    host: float | None = None
    tokens: int | None = None
    fit: bool = False


@dataclass(frozen=True)
class Kind:
    """Rows of one length and mask, each a pass of its own.

    Attributes:
        length: Tokens of the longest of them, padding left out.
        documents: Boundaries of some.
        packs: What is known of them as packs.
    """

    length: int
    documents: tuple[tuple[int, ...], ...]
    packs: PlannedPacks


@dataclass(frozen=True)
class Price:
    """What a step takes.

    Attributes:
        seconds: Of a step.
        gpu_bytes: Of each GPU at the worst moment, all in all.
        tensor_bytes: The same without context and fragmentation.
        tokens: Of the longest row, or of a pack.
        step_tokens: Of a step in the mean.
        step_pairs: Query-key pairs of a step in the mean.
    """

    seconds: float
    gpu_bytes: float
    tensor_bytes: float
    tokens: int
    step_tokens: float
    step_pairs: float


def run_workload(asked: Asked) -> tuple[Workload, PlannedRows | None, int | None]:
    """The workload of a run as its config says, what its packed rows told, and its row length where that is known."""
    config, gpus, shape = asked.config, asked.gpus, asked.shape
    rows = planned_packs(config, gpus, shape) if config.parallel.dynamic else planned_rows(config.data)
    known = asked.tokens or (rows.length if rows else config.length)
    length = known or declared_window(asked.model.get_text_config())
    documents, packs = (rows.documents, rows.packs) if rows else (None, None)
    workload = Workload(config, asked.model, shape, asked.machine, length, gpus, documents, packs)
    return _fitted(asked, workload), rows, known


def priced(asked: Asked) -> Price:
    """What a step of a run takes as its config says.

    Raises:
        ValueError: The scheme or the head chunks are not for so many GPUs.
    """
    workload, _, _ = run_workload(asked)
    tokens, seconds = workload.step_tokens, sum(line.value for line in step_time(workload))
    return _price(workload, seconds, tokens, workload.keys_seen * tokens)


def one_row_passes(asked: Asked) -> Price:
    """What a step of mixed rows takes at the config's degree, each row in a pass of its own.

    Each kind of rows (a length and mask) is planned as passes of its own; what comes once a step is counted once.

    Raises:
        ValueError: As in `priced`; or the groups can't read as many rows each.
    """
    config = replace(asked.config, parallel=asked.config.parallel.decided(asked.config.parallel.shared_by, True))
    asked = replace(asked, config=config)
    kinds, waiting = _kinds(asked)
    passes, once, longest = 0.0, 0.0, None
    for kind in kinds:
        known = (asked.model, asked.shape, asked.machine, kind.length, asked.gpus, kind.documents, kind.packs)
        workload = _fitted(asked, Workload(config, *known))
        lines = step_time(workload)
        once = max(once, sum(line.value for line in lines if line.name in ONCE))
        passes += sum(line.value for line in lines if line.name not in ONCE)
        longest = workload if longest is None or gpu_total(workload) > gpu_total(longest) else longest
    assert longest is not None
    tokens, pairs = sum(kind.packs.tokens for kind in kinds), sum(kind.packs.pairs for kind in kinds)
    return _price(longest, passes * waiting + once, tokens, pairs)


def _fitted(asked: Asked, workload: Workload) -> Workload:
    return workload.with_memory(autotune_memory(workload, asked.budget, asked.host)) if asked.fit else workload


def _price(workload: Workload, seconds: float, tokens: float, pairs: float) -> Price:
    tensors = sum(line.value for line in gpu_memory(workload) if line.name.startswith("tensors:") and line.counts)
    return Price(seconds, gpu_total(workload), tensors, workload.tokens, tokens, pairs)


def _kinds(asked: Asked) -> tuple[list[Kind], float]:
    """The kinds of rows of some steps as passes, in the mean of those steps; and what groups wait for each other.

    The waiting is a factor: seconds over those of equally busy groups, which meet in every pass.
    """
    config, shape = asked.config, asked.shape
    order, groups = RowOrder.of_run(config), asked.gpus // config.parallel.shared_by
    rows = config.global_batch_size
    if rows % groups:
        raise ValueError(f"{rows} rows of a step are no multiple of {groups} groups.")
    steps, found = min(SAMPLED_STEPS, config.steps), dict[tuple[int, bool], list[tuple[int, ...]]]()
    longest = even = 0.0
    for step in middles(config.steps, steps):
        for each in _passes(order, step * rows, rows, groups):
            work = []
            for place, edges in each:
                folder = order.folders[place]
                found.setdefault((folder.length, folder.mask_documents), []).append(edges)
                work.append(edges[-1] * shape.token_work + query_key_pairs(0, edges))
            longest, even = longest + max(work), even + sum(work) / groups
    return [_kind(edges, groups, steps) for _, edges in sorted(found.items())], longest / even


def _passes(order: RowOrder, first: int, rows: int, groups: int) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """For each pass of a step the rows that the groups read side by side: their sources and boundaries."""
    each = rows // groups
    for number in range(each):
        places = [order.place(first + group * each + number) for group in range(groups)]
        yield [(place.source, order.documents(place)) for place in places]


def _kind(rows: list[tuple[int, ...]], groups: int, steps: int) -> Kind:
    """Rows of one kind as what is known of packs; these pass one by one."""
    tokens, pairs = (sum(values) / steps for values in ([e[-1] for e in rows], [query_key_pairs(0, e) for e in rows]))
    packs = PlannedPacks(tokens, pairs, len(rows) / groups / steps, waiting=1.0)
    falling = sorted(rows, key=lambda edges: -edges[-1])
    return Kind(falling[0][-1], tuple(falling[:: max(1, len(rows) // SEEN)]), packs)
