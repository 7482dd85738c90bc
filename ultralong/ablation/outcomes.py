"""What one model scored, sample by sample, read from the files that an evaluation left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ultralong.evaluation.measures.result import Result, read_measurements
from ultralong.evaluation.measures.score import grades
from ultralong.evaluation.runs.answer_files import answer_files
from ultralong.utils.files import read_jsonl

TESTS, NEEDLES, PERPLEXITY, LONGPPL = "all tests", "needles", "perplexity", "LongPPL"
BEYOND = " beyond the old window"


@dataclass(frozen=True)
class Outcome:
    """One measure of one model.

    Attributes:
        name: What is measured, such as `niah_single_1 at 4,096` or `perplexity beyond the old window`.
        unit: `per cent` for scores, `nats` for the loss behind a perplexity.
        samples: Name of each sample; the same samples have the same names in every arm.
        values: Value of each.
        headline: Whether it joins others: these are drawn, the rest is in the table.
    """

    name: str
    unit: Literal["per cent", "nats"]
    samples: tuple[str, ...]
    values: tuple[float, ...]
    headline: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """The reverse of `to_dict`."""
        return cls(**{**values, "samples": tuple(values["samples"]), "values": tuple(values["values"])})


def read_outcomes(folder: Path, window: int) -> list[Outcome]:
    """The outcomes of an evaluation: joined ones first, then each test at each length.

    Args:
        folder: Folder of the run.
        window: Tokens of the model's window before it was extended.

    Raises:
        ValueError: There is nothing that can be compared sample by sample.
    """
    tests = {(task, length): _answers(task, length, path) for (task, length), path in answer_files(folder).items()}
    needles = _needles(folder / "needle.jsonl")
    joined = [*_joined(TESTS, tests, window), *_joined(NEEDLES, needles, window)]
    nats = [*_perplexity(folder / "perplexity.json", window), *_longppl(folder / "longppl.json")]
    found = [*joined, *nats, *tests.values(), *needles.values()]
    if not found:
        raise ValueError(f"{folder} holds no answers, needles or perplexity: name such tests in base.evaluation.tasks.")
    return found


def _answers(task: str, length: int, path: Path) -> Outcome:
    records = read_jsonl(path)
    values = tuple(100 * grade for grade in grades(task, records))
    return Outcome(f"{task} at {length:,}", "per cent", tuple(f"{task} {length} {r['index']}" for r in records), values)


def _needles(path: Path) -> dict[tuple[str, int], Outcome]:
    """Needles by length; of two cells of one length and depth the later one counts."""
    cells = {(cell["length"], cell["depth"]): cell for cell in (read_jsonl(path) if path.exists() else ())}
    found = {}
    for length in sorted({length for length, _ in cells}):
        names, values = [], []
        for (of, depth), cell in sorted(cells.items()):
            if of == length:
                names += [f"needle {length} {depth} {sample}" for sample in range(cell["n"])]
                values += [0.0 if sample in cell["missed"] else 100.0 for sample in range(cell["n"])]
        found["needle", length] = Outcome(f"needle at {length:,}", "per cent", tuple(names), tuple(values))
    return found


def _joined(name: str, parts: dict[tuple[str, int], Outcome], window: int) -> list[Outcome]:
    """All samples of several tests and lengths, and those of the lengths beyond the old window."""
    beyond = [outcome for (_, length), outcome in parts.items() if length > window]
    groups: dict[str, Sequence[Outcome]] = {name: list(parts.values()), name + BEYOND: beyond}
    return [
        Outcome(
            title,
            "per cent",
            tuple(sample for outcome in group for sample in outcome.samples),
            tuple(value for outcome in group for value in outcome.values),
            headline=True,
        )
        for title, group in groups.items()
        if group
    ]


def _perplexity(path: Path, window: int) -> list[Outcome]:
    """Mean loss of each row, over the whole row and over the positions beyond the old window."""
    results = read_measurements(path) if path.exists() else []
    result: Result | None = next((r for r in results if r.metric == "perplexity_by_row"), None)
    if result is None:
        return []
    found = []
    for name, first in ((PERPLEXITY, 0), (PERPLEXITY + BEYOND, window)):
        bins = [part.details["each"] for part in result.by_position if (part.start or 0) >= first]
        names, values = [], []
        for row, parts in enumerate(zip(*bins, strict=True)):
            nats, tokens = (sum(column) for column in zip(*parts, strict=True))
            if tokens:
                names.append(f"row {row}")
                values.append(nats / tokens)
        if values:
            found.append(Outcome(name, "nats", tuple(names), tuple(values), headline=True))
    return found


def _longppl(path: Path) -> list[Outcome]:
    """Mean loss of the key tokens of each document; the same evaluator chose them for every arm."""
    if not path.exists():
        return []
    (result,) = read_measurements(path)
    each = result.details["each"]
    names = tuple(f"document {document}" for document, _, _ in each)
    return [Outcome(LONGPPL, "nats", names, tuple(nats / tokens for _, nats, tokens in each), headline=True)]
