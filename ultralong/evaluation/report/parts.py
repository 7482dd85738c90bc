"""What a run's page is put together from: tables, sections, and the one or two runs that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultralong.evaluation.measures.result import Part, Result
from ultralong.evaluation.report.page import Drawn


@dataclass(frozen=True)
class Table:
    """A table, under a title if it has one; a `folded` one is opened by its title."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = True
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; what is None or empty in it is left out."""

    title: str
    figures: Sequence[Drawn | None] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Side:
    """One run of those that a page shows.

    Attributes:
        name: `before` or `after`; nothing where there is one alone.
        summary: As `results.summarise` gives it.
        results: Its results.
    """

    name: str
    summary: Mapping[str, Any]
    results: Sequence[Result] = field(default_factory=list)

    @classmethod
    def of(cls, summary: Mapping[str, Any], name: str) -> Side:
        """The side of a summary."""
        return cls(name, summary, [Result.from_dict(values) for values in summary["results"]])

    @property
    def lead(self) -> str:
        """What stands in front of a row's name."""
        return f"{self.name}: " if self.name else ""

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.summary["settings"]["model"])

    @property
    def window(self) -> int | None:
        """The model's window in tokens, as its config says."""
        return self.summary["window"]

    @property
    def needle(self) -> Result | None:
        """The needle map."""
        return next((result for result in self.results if result.metric == "found"), None)

    @property
    def scores(self) -> list[Result]:
        """Scores of tests."""
        return [result for result in self.results if result.metric == "score"]

    @property
    def benchmarks(self) -> list[Result]:
        """lm-eval's benchmarks."""
        return [result for result in self.results if "lm_eval" in result.details]

    def by_metric(self, metric: str) -> Result | None:
        """The result of a metric, such as `loss`."""
        return next((result for result in self.results if result.metric == metric), None)

    def mark(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The window's line for a figure, where some lengths lie beyond it and some do not."""
        lengths = [part.length or 0 for part in parts]
        inside = self.window and min(lengths) <= self.window < max(lengths)
        return {"base_window": self.window if inside else None, "window_name": "window"}
