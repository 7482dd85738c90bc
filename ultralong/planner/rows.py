"""What the packed rows of a run say of its work: their length, and their documents where those don't see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, pairwise
from pathlib import Path

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.planner.shapes import Shape
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, TrainConfig
from ultralong.training.throughput import query_key_pairs

SAMPLED = 32  # rows whose documents are looked at, evenly over the folders
SAMPLED_STEPS = 8  # steps whose packs are looked at, evenly over the run


@dataclass(frozen=True)
class PlannedPacks:
    """What the packs of some steps are under dynamic context parallelism, in the mean of those steps.

    Attributes:
        tokens: Tokens of a step.
        pairs: Query-key pairs of a step.
        passes: Passes of a step.
        waiting: Seconds of a step over those of equally busy groups: in each pass all wait for the busiest.
    """

    tokens: float
    pairs: float
    passes: float
    waiting: float


@dataclass(frozen=True)
class PlannedRows:
    """Rows of a run.

    Attributes:
        length: Tokens of a row.
        documents: Boundaries of some rows, each from 0 to `length`; None where every token sees all before it. A row's
            padding is a document of its own, as the trainer attends inside it; packs leave it out, as the trainer does.
        packs: What is known of packs, where rows are packed by the step; a row is then a pack.
    """

    length: int
    documents: tuple[tuple[int, ...], ...] | None
    packs: PlannedPacks | None = None


def planned_rows(sources: Sequence[DataSource]) -> PlannedRows | None:
    """Look at the folders of packed rows; None where the first of them does not exist yet.

    Each folder is looked at as often as the run draws from it.
    """
    folders = [Path(source.rows) for source in sources]
    if not (folders[0] / "manifest.json").is_file():
        return None
    first = PackedRows(folders[0])
    if not first.mask_documents:
        return PlannedRows(first.length, None)
    total, found = sum(source.weight for source in sources), []
    for source, folder in zip(sources, folders, strict=True):
        rows = PackedRows(folder) if (folder / "manifest.json").is_file() else first
        count = min(len(rows), max(1, round(SAMPLED * source.weight / total)))
        found += [tuple(rows[place].boundaries.tolist()) for place in middles(len(rows), count)]
    return PlannedRows(first.length, tuple(found))


def middles(places: int, parts: int) -> list[int]:
    """Of so many places the middle one of each of equal parts: the last row, mostly padding perhaps, is one of all."""
    return [(2 * part + 1) * places // (2 * parts) for part in range(parts)]


def planned_packs(config: TrainConfig, gpus: int, shape: Shape) -> PlannedRows | None:
    """Pack some steps of a run under dynamic context parallelism; None where a source is not packed yet.

    Args:
        config: The run.
        gpus: Its processes.
        shape: Its model, by which a token's work beside attention is weighed.
    """
    if not all((Path(source.rows) / "manifest.json").is_file() for source in config.data):
        return None
    order, size = RowOrder.of_run(config), config.parallel.shared_by
    rows, groups = config.global_batch_size, gpus // size
    count, found = min(SAMPLED_STEPS, config.steps), list[tuple[int, ...]]()
    tokens = pairs = passes = longest = even = 0.0
    for step in middles(config.steps, count):
        packs = order.packs(step * rows, rows, groups, order.most_pack_tokens(config), shape.token_work)
        tokens, pairs, passes = tokens + packs.tokens, pairs + packs.pairs, passes + len(packs.passes)
        even += (packs.tokens * shape.token_work + packs.pairs) / groups
        for each in packs.passes:
            edges = [order.boundaries(pack) for pack in each if pack]
            longest += max(known[-1] * shape.token_work + query_key_pairs(0, known) for known in edges)
            found += edges
    most = max(edges[-1] for edges in found)
    means = PlannedPacks(tokens / count, pairs / count, passes / count, longest / even)
    return PlannedRows(most, tuple(found), means)


def at_length(boundaries: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Boundaries of a row of another length whose documents are those of this one, over and over."""
    if boundaries[-1] == tokens:
        return tuple(boundaries)
    lengths = cycle([b - a for a, b in pairwise(boundaries)])
    edges = [0]
    for edge in accumulate(lengths):
        edges.append(min(edge, tokens))
        if edge >= tokens:
            return tuple(edges)
    raise AssertionError("documents have tokens")
