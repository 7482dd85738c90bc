"""What a recipe takes: documents and tokens by length, before and after sampling, for every source.

From the folder of finished rows the numbers are read out of its report; from a recipe the texts are read and sampled,
but not tokenised, so that lengths are estimates by characters per token.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.utils.files import read_json

TABLES = ("before", "after")


def recipe_stats(
    recipe: Recipe | str | os.PathLike[str],
    *,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Read and sample a recipe's documents and count them; nothing is written.

    Args:
        recipe: A recipe, its name, its YAML file, or a folder of texts.
        limit: About this many tokens of each source at most.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.

    Returns:
        For every source: licence, characters per token, what was read and skipped, and lengths before and after.

    Raises:
        ValueError: The recipe holds conversations, whose lengths need the tokenizer: build it, then ask its folder.
    """
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).with_token_limit(limit)
    if recipe.kind == "chat":
        raise ValueError(f"recipe {recipe.name} holds conversations: build it, then give the folder of its rows.")
    sources: dict[str, Any] = {}
    for source in recipe.sources:
        opened = SourceReader(source, recipe, cache, quiet)
        deque(opened.documents(), maxlen=0)
        sources |= {name: {"license": source.license, **notes} for name, notes in opened.notes().items()}
    return {"recipe": recipe.name, "estimated": True, "sources": sources}


def folder_stats(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The same numbers from a folder of rows that `pack` or `data build` finished.

    Raises:
        ValueError: The folder holds no report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no report.json: it is neither a recipe nor a folder of finished rows.")
    report = read_json(path)
    return {"recipe": report["recipe"], "estimated": False, "sources": report["sources"], "counts": report["counts"]}


def bucket_names(edges: list[int]) -> list[str]:
    """Names of the buckets between edges, in tokens."""
    inner = [f"{_short(a)} - {_short(b)}" for a, b in pairwise(edges)]
    return [f"< {_short(edges[0])}", *inner, f"> {_short(edges[-1])}"]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def totals(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables of all sources added up.

    Raises:
        ValueError: No source was counted.
    """
    tables = [facts["lengths"] for facts in sources.values() if "lengths" in facts]
    if not tables:
        raise ValueError("no source has lengths.")
    return {
        "edges": tables[0]["edges"],
        **{
            when: {
                kind: [sum(column) for column in zip(*(table[when][kind] for table in tables), strict=True)]
                for kind in ("documents", "tokens")
            }
            for when in TABLES
        },
    }


def format_table(stats: Mapping[str, Any]) -> str:
    """Documents, tokens and the share of tokens in every bucket, a line for each source, before and after."""
    counted = {name: facts["lengths"] for name, facts in stats["sources"].items() if "lengths" in facts}
    every = {**counted, "all": totals(stats["sources"])}
    names = bucket_names(every["all"]["edges"])
    wide = max(12, *map(len, every))
    lines = [f"{'source':{wide}}  {'':6} {'documents':>12} {'tokens':>16}  share of tokens"]
    lines.append(f"{'':{wide}}  {'':6} {'':>12} {'':>16}  " + " ".join(f"{name:>12}" for name in names))
    for name, lengths in every.items():
        for when in TABLES:
            tokens = sum(lengths[when]["tokens"])
            shares = " ".join(f"{part / tokens if tokens else 0.0:>12.1%}" for part in lengths[when]["tokens"])
            lines.append(
                f"{name if when == 'before' else '':{wide}}  {when:6} "
                f"{sum(lengths[when]['documents']):>12,} {tokens:>16,}  {shares}"
            )
    for name, facts in stats["sources"].items():
        skipped = facts.get("read", {}).get("skipped", {})
        if skipped:
            lines.append(
                f"{name}: left out: " + ", ".join(f"{reason} ({count:,})" for reason, count in skipped.items())
            )
    return "\n".join(lines)


def shares_by_length(stats: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each length bucket's share of the tokens, before and after sampling, for every source and for all together.

    Returns:
        For every "NAME, before" and "NAME, after": bucket to share; what a bar chart of them shows.
    """
    bars = {}
    for name, facts in {**stats["sources"], "all": {"lengths": totals(stats["sources"])}}.items():
        if "lengths" not in facts:
            continue
        for when in TABLES:
            tokens = facts["lengths"][when]["tokens"]
            buckets = zip(bucket_names(facts["lengths"]["edges"]), tokens, strict=True)
            bars[f"{name}, {when}"] = {bucket: count / max(1, sum(tokens)) for bucket, count in buckets}
    return bars
