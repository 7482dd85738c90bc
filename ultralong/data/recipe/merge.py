"""The token stores of a datatrove run merged and packed into rows, with the report that one machine would write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ultralong.data.read.documents import nothing_taken
from ultralong.data.recipe.build import PackReport, make_report
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.merge import add_numbers, merge_stores
from ultralong.utils.files import read_json, write_json
from ultralong.utils.progress import Stopwatch
from ultralong.utils.settings import save


def pack_merged(
    base: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    length: int,
    out: str | os.PathLike[str],
    *,
    quiet: bool = False,
) -> PackReport:
    """Merge the token stores of a datatrove run and pack them, as `pack_recipe` packs what it tokenised itself.

    Args:
        base: Folder of the run.
        recipe: The recipe that it ran.
        tokenizer: Folder of the tokenizer.
        length: Tokens per row.
        out: Folder of the rows; `tokens/` inside it holds the merged store.
        quiet: True shows no progress bars.

    Raises:
        ValueError: A task has not finished, or as for `merge_stores` and `pack`.
    """
    loaded, base, out, watch = load_recipe(recipe), Path(base), Path(out), Stopwatch()
    settings = loaded.row_settings(length)
    if not isinstance(settings, PackSettings):
        raise ValueError(f"recipe {loaded.name} is of {loaded.kind}; a datatrove run is of documents.")
    ranks, done = (sorted(path.name for path in (base / name).glob("[0-9]*")) for name in ("read", "tokens"))
    if not ranks or ranks != done:
        missing = ", ".join(sorted({*ranks} - {*done})) or "all"
        raise ValueError(f"{base} is not finished: tasks without tokens: {missing}. Run its pipeline.py again.")
    with watch.stage("merge"):
        store = merge_stores([base / "tokens" / name for name in done], out / "tokens")
    with watch.stage("pack"):
        rows = pack(store, load_tokenizer(tokenizer), out, settings, quiet=quiet)
    licenses = {name: source.license for source in loaded.sources for name in loaded.budgets(source)}
    reads: dict[str, Any] = {}
    for name in ranks:
        for path in sorted((base / "read" / name).glob("*.json")):
            reads[path.stem] = add_numbers(reads[path.stem], read_json(path)) if path.stem in reads else read_json(path)
    noted = read_json(store.folder / "sources.json")
    sources = {
        name: {
            **nothing_taken(),
            "license": licenses[name],
            **store.manifest["sources"].get(name, {}),
            **noted.get(name, {}),
            "read": reads[name.split("/")[0]],
        }
        for name in licenses
    }
    save(loaded, out / "recipe.yaml", "The recipe these rows were made from, every setting written out.")
    report = make_report(loaded, rows, sources, watch)
    write_json(out / "report.json", report.to_dict())
    return report
