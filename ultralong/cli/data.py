"""Commands on data: build a recipe, count what it takes, look into its rows."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, resumable

if TYPE_CHECKING:
    from ultralong.data.recipe.build import PackReport
    from ultralong.data.rows.inspect_rows import RowView


@takes(
    work=Group("ultralong.api.make:pack", positional=("recipe",), names={"changes": "set"}, defaults={"length": 131072})
)
def build(work: partial[PackReport], *, json: Json = None) -> None:
    """Pack a recipe into rows, and show what went in: lengths by source, time, memory.

    The same rows as pack; besides, the lengths before and after sampling for every source, the time of each stage and
    the peak of memory. Stop it at any time; the same command resumes and ends in the same bytes.

    Example: ultralong data build debian-docs --tokenizer llama-1m --length 1m --limit 2m --out rows

    Args:
        work: The function, with what is packed and how.
        json: Write the report as JSON to this file.
    """
    import resource

    from ultralong.data.recipe import stats

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    with resumable(work.keywords["out"]):
        report = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    leave(json, {**report.to_dict(), "peak_memory_bytes": peak, "of_it_before_reading_bytes": before})
    print(report)
    print(stats.format_table(stats.folder_stats(work.keywords["out"])))
    print(f"seconds: {report.seconds}; peak memory {peak / 2**20:,.0f} MiB")


@takes(work=Group("ultralong.api.texts:count_lengths", positional=("target",), names={"changes": "set"}))
def stats(work: partial[dict[str, Any]], *, picture: Path | None = None, json: Json = None) -> None:
    """Count documents and tokens by length, before and after sampling, for every source.

    A folder of finished rows is read at once. A recipe is read and sampled without being tokenised, so its lengths are
    estimated from characters.

    Example: ultralong data stats gutenberg-sotu --picture lengths.png

    Args:
        work: The function, with what is counted.
        picture: Write the picture to this PNG file.
        json: Write the numbers as JSON to this file.
    """
    from ultralong.data.recipe import stats as counting

    counted = work()
    leave(json, counted)
    print(counting.format_table(counted))
    if picture is not None:
        from ultralong import figures

        title = f"{counted['recipe']}: tokens by the length of their document"
        figure = figures.shares(counting.shares_by_length(counted), title, "share of tokens")
        figures.save_png(figure.update_xaxes(tickformat=".0%"), picture)
        print(f"picture: {picture}")


@takes(work=Group("ultralong.api.texts:view_row", positional=("rows",)))
def show(
    work: partial[RowView],
    *,
    most: int = 12,
    colour: Literal["auto", "always", "never"] = "auto",
    html: Path | None = None,
    json: Json = None,
) -> None:
    """Print a packed row: its documents in colours, separators, labels around the boundaries.

    Example: ultralong data show rows --tokenizer llama-1m --row 3

    Args:
        work: The function, with the row.
        most: Documents shown at either end of the row.
        colour: Colours when the output is a terminal (auto), always or never.
        html: Write the row as an HTML page to this file.
        json: Write what is shown as JSON to this file.
    """
    from dataclasses import asdict

    from ultralong.data.rows.inspect_rows import as_html, as_text
    from ultralong.utils.files import write_text

    view = work()
    leave(json, asdict(view))
    paint = colour == "always" or (colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    print(as_text(view, colour=paint, most=most))
    if html is not None:
        write_text(html, f"<!doctype html><meta charset=utf-8>{as_html(view, most=most)}\n")
