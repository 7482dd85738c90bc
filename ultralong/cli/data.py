"""Commands on data: build a recipe, count what it takes, look into its rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ultralong.cli.shared import Json, leave
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.units import Tokens


def build(
    recipe: Positional[str],
    /,
    *,
    tokenizer: str,
    out: Path,
    length: Tokens = 131072,
    limit: Tokens | None = None,
    set: tuple[str, ...] = (),
    cache: Path | None = None,
    workers: int = 1,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Pack a recipe into rows, and show what went in: lengths by source, time, memory.

    The same rows as pack; besides, the lengths before and after sampling for every source, the time of each stage and
    the peak of memory. Stop it at any time; the same command resumes and ends in the same bytes.

    Example: ultralong data build debian-docs --tokenizer llama-1m --length 1m --limit 2m --out rows

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        tokenizer: Folder or hub id of the model whose tokenizer is used.
        out: Folder to write the rows into.
        length: Tokens of a row.
        limit: Take about this many tokens of each source at most, to try a recipe out.
        set: Changes of the recipe, such as seed=1.
        cache: Where fetched packages are kept; by default ~/.cache/ultralong/sources.
        workers: Processes that tokenise; 1 leaves it to the tokenizer's threads.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    import resource

    from ultralong.data.recipe import stats
    from ultralong.data.recipe.build import pack_recipe
    from ultralong.data.recipe.schema import load_recipe

    loaded = load_tokenizer(tokenizer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    report = pack_recipe(
        load_recipe(recipe, set), loaded, length, out, limit=limit, cache=cache, workers=workers, quiet=quiet
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    leave(json, {**report.to_dict(), "peak_memory_bytes": peak, "of_it_before_reading_bytes": before})
    print(report)
    print(stats.format_table(stats.folder_stats(out)))
    print(f"seconds: {report.seconds}; peak memory {peak / 2**20:,.0f} MiB")


def stats(
    target: Positional[str],
    /,
    *,
    limit: Tokens | None = None,
    set: tuple[str, ...] = (),
    cache: Path | None = None,
    picture: Path | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Count documents and tokens by length, before and after sampling, for every source.

    A folder of finished rows answers at once. A recipe is read and sampled without being tokenised, so its lengths are
    estimated from characters.

    Example: ultralong data stats gutenberg-sotu --picture lengths.png

    Args:
        target: A folder of rows, or a recipe's name, YAML file or folder of texts.
        limit: With a recipe: about this many tokens of each source at most.
        set: With a recipe: changes of it, such as length_rule.long_copies=2.
        cache: Where fetched packages are kept.
        picture: Write the picture to this PNG file.
        quiet: No progress bars.
        json: Write the numbers as JSON to this file.
    """
    from ultralong.data.recipe import stats as counting
    from ultralong.data.recipe.schema import load_recipe

    if (Path(target) / "report.json").is_file():
        counted = counting.folder_stats(target)
    else:
        counted = counting.recipe_stats(load_recipe(target, set), limit=limit, cache=cache, quiet=quiet)
    leave(json, counted)
    print(counting.format_table(counted))
    if picture is not None:
        from ultralong import figures

        title = f"{counted['recipe']}: tokens by the length of their document"
        figure = figures.shares(counting.shares_by_length(counted), title, "share of tokens")
        figures.save_png(figure.update_xaxes(tickformat=".0%"), picture)
        print(f"picture: {picture}")


def show(
    rows: Positional[Path],
    /,
    *,
    tokenizer: str,
    row: int = 0,
    edge: int = 24,
    boundaries: int = 3,
    most: int = 12,
    colour: Literal["auto", "always", "never"] = "auto",
    html: Path | None = None,
    json: Json = None,
) -> None:
    """Print a packed row: its documents in colours, separators, labels around the boundaries.

    Example: ultralong data show rows --tokenizer llama-1m --row 3

    Args:
        rows: Folder of packed rows.
        tokenizer: Folder or hub id of the tokenizer that they were made with.
        row: Which row; -1 is the last.
        edge: Tokens shown of each document's beginning and end.
        boundaries: For how many boundaries the tokens, labels and positions around are listed.
        most: Documents shown at either end of the row.
        colour: Colours when the output is a terminal (auto), always or never.
        html: Write the row as an HTML page to this file.
        json: Write what is shown as JSON to this file.
    """
    from dataclasses import asdict

    from ultralong.data.rows.inspect_rows import as_html, as_text, inspect_row
    from ultralong.data.rows.packed_rows import PackedRows
    from ultralong.utils.files import write_text

    view = inspect_row(PackedRows(rows), load_tokenizer(tokenizer), row, edge=edge, boundaries=boundaries)
    leave(json, asdict(view))
    paint = colour == "always" or (colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    print(as_text(view, colour=paint, most=most))
    if html is not None:
        write_text(html, f"<!doctype html><meta charset=utf-8>{as_html(view, most=most)}\n")
