"""A recipe's texts as JSON lines: the clean ones of it, or all of its conversations."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ultralong.data.recipe.schema import Recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.select.decontaminate import Decontaminate, OverlapLog, read_tests
from ultralong.utils.files import atomic_path, locked, write_json

CLEAN, HITS, REPORT = "clean.jsonl", "contaminated.jsonl", "report.json"


def write_clean(
    recipe: Recipe,
    settings: Decontaminate,
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write what of a recipe does not overlap with the tests, as `clean.jsonl`, every text once.

    The length rule is not applied here, so that the clean file can be sampled later like any other.

    Args:
        recipe: Documents or conversations.
        settings: The tests and the rule.
        out: Folder to write; `contaminated.jsonl` in it names what overlaps and `report.json` counts.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.

    Returns:
        The report: for every source texts checked, dropped, cut, and hits by test set.
    """
    out = Path(out)
    recipe = replace(recipe, length_rule=None, decontaminate=settings)
    with locked(out):
        tests, report = read_tests(settings, cache, quiet), {}
        # The report goes first and comes last: with it, the files beside it are of one run and whole.
        (out / REPORT).unlink(missing_ok=True)
        with (
            atomic_path(out / HITS) as partial_hits,
            atomic_path(out / CLEAN) as partial,
            closing(OverlapLog(partial_hits)) as hits,
            open(partial, "w", encoding="utf-8") as stream,
        ):
            for source in recipe.sources:
                opened = SourceReader(source, recipe, cache, quiet, tests=tests, hits=hits)
                for item in opened.documents() if recipe.kind == "documents" else opened.conversations():
                    stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
                report[source.name] = opened.overlap()["decontaminated"]
        told = {"recipe": recipe.name, "sources": report}
        write_json(out / REPORT, told)
    return told
