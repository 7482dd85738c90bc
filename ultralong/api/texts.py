"""Functions on recipes and rows beside `pack`: what they hold, a row made readable, tests kept out, parts merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ultralong.api.names import Changes, Named, StrPath, Words, as_overrides
from ultralong.utils.units import Tokens

if TYPE_CHECKING:
    from ultralong.data.recipe.build import PackReport
    from ultralong.data.rows.inspect_rows import RowView


def count_lengths(
    target: Named,
    *,
    limit: Tokens | None = None,
    changes: Changes = (),
    cache: StrPath | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Count documents and tokens by length, before and after sampling, for every source.

    Args:
        target: A folder of rows, or a recipe's name, YAML file or folder of texts.
        limit: With a recipe: about this many tokens of each source at most.
        changes: With a recipe: changes of it, such as length_rule.long_copies=2.
        cache: Where fetched packages are kept; by default ~/.cache/ultralong/sources.
        quiet: No progress bars.

    Returns:
        As `ultralong.data.recipe.stats.folder_stats` for rows, `recipe_stats` for a recipe, whose lengths are
        estimated from characters.

    Raises:
        ValueError: No such rows or recipe, or a recipe of conversations, whose lengths need the tokenizer.
    """
    from pathlib import Path

    from ultralong.data.recipe import stats
    from ultralong.data.recipe.schema import load_recipe

    if (Path(target) / "report.json").is_file():
        return stats.folder_stats(target)
    recipe = load_recipe(target, tuple(as_overrides(changes)))
    return stats.recipe_stats(recipe, limit=limit, cache=cache, quiet=quiet)


def view_row(rows: StrPath, tokenizer: Named, row: int = 0, *, edge: int = 24, boundaries: int = 3) -> RowView:
    """Make one packed row readable: its documents, separators and labels.

    Args:
        rows: Folder of packed rows.
        tokenizer: Folder or hub id of the tokenizer (or miniature) that they were made with.
        row: Which row; -1 is the last.
        edge: Tokens shown of each document's beginning and end.
        boundaries: For how many boundaries the tokens, labels and positions around are listed.

    Returns:
        The view; `ultralong.data.rows.inspect_rows` writes it as text or HTML.

    Raises:
        ValueError: The tokenizer is another one, or there is no such row.
    """
    from ultralong.data.rows.inspect_rows import inspect_row
    from ultralong.data.rows.packed_rows import PackedRows
    from ultralong.utils.hub import load_tokenizer

    return inspect_row(PackedRows(rows), load_tokenizer(tokenizer), row, edge=edge, boundaries=boundaries)


def decontaminate(
    recipe: Named,
    against: Annotated[Sequence[StrPath], Words(tuple[str, ...])],
    out: StrPath,
    *,
    words: int = 13,
    shortest: int = 8,
    action: Literal["drop", "cut"] = "drop",
    fields: Annotated[Sequence[str], Words(tuple[str, ...])] = (),
    cache: StrPath | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a recipe's texts without those that overlap with test sets, and what was left out.

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        against: Files or folders of test items: text, JSON lines, JSON, Parquet.
        out: Folder to write: clean.jsonl, contaminated.jsonl (what overlaps, with the words) and report.json.
        words: Number of words in a row (n of the n-gram) that count as an overlap.
        shortest: Words of the shortest item that is looked for as a whole.
        action: drop leaves a document out; cut takes the words out with 200 characters on either side.
        fields: Fields of a test record to look for; by default every text in it.
        cache: Where fetched packages are kept; by default ~/.cache/ultralong/sources.
        quiet: No progress bars.

    Returns:
        The report: for every source texts checked, dropped and cut, and hits by test set.

    Raises:
        ValueError: The recipe or a file of tests cannot be read, or `out` was made from something else.
    """
    from pathlib import Path

    from ultralong.data.recipe.clean_files import write_clean
    from ultralong.data.recipe.schema import load_recipe
    from ultralong.data.select.decontaminate import Decontaminate, TestSet

    tests = tuple(TestSet(path.name, str(path), fields=tuple(fields)) for path in map(Path, against))
    return write_clean(load_recipe(recipe), Decontaminate(tests, words, shortest, action), out, cache, quiet)


def merge_stores(
    base: StrPath, recipe: Named, tokenizer: StrPath, length: Tokens, out: StrPath, *, quiet: bool = False
) -> PackReport:
    """Make one token store of the many that a datatrove run left, and pack it into rows.

    Args:
        base: Folder of the run.
        recipe: The recipe that it ran: its packing is used.
        tokenizer: Folder of the tokenizer.
        length: Tokens of a row.
        out: Folder to write the rows into; the store goes into tokens/ inside it.
        quiet: No progress bars.

    Returns:
        As `ultralong.pack`.

    Raises:
        ValueError: A task has not finished, or as for `ultralong.pack`.
    """
    from ultralong.data.recipe.merge import pack_merged

    return pack_merged(base, recipe, tokenizer, length, out, quiet=quiet)
