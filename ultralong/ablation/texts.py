"""Texts on this machine that a study reads. What it packs is named by its recipe, which does not hold their content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ultralong.ablation.keys import recipe_of
from ultralong.ablation.study import Study
from ultralong.data.read.listing import files_digest, list_files
from ultralong.data.recipe.schema import Source
from ultralong.utils.files import read_json, write_json

TEXTS = "texts.json"


def keep_texts(study: Study, record: Path) -> None:
    """Note the files that a study reads, by their names, sizes and times; refuse those that changed since.

    Without it arms that are packed before and after a change would be compared as if they had read the same texts.

    Args:
        study: The study.
        record: Where they are noted; the caller holds it.

    Raises:
        ValueError: Texts are not those that were noted, or there are none.
    """
    noted: dict[str, str] = read_json(record) if record.exists() else {}
    found = dict(noted)
    for source in _local(study):
        assert source.path is not None
        name = " ".join((str(source.path), *source.include, *(f"without {pattern}" for pattern in source.exclude)))
        found[name] = files_digest(list_files(Path(source.path), source.include, source.exclude))
        if name in noted and noted[name] != found[name]:
            raise ValueError(
                f"the texts in {source.path} are not those that were there when {record.parent} was first used, and "
                "what it packed of those is kept: arms would be compared over different texts. Take a new --out. If "
                f"only the times of the files have changed, delete {record}."
            )
    if found != noted:
        write_json(record, found)


def _local(study: Study) -> Iterator[Source]:
    """Sources of files on this machine."""
    for design in study.designs().values():
        groups = [design.rows, design.heldout, *(() if design.sft is None else (design.sft.rows,))]
        for rows in groups:
            yield from (source for source in recipe_of(rows).sources if source.path is not None)
