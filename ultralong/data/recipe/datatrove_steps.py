"""A recipe's steps in a `datatrove` pipeline: many tasks, on one machine or on a cluster, each with its part.

A step is called with the documents so far, the task's number and how many there are, which is datatrove's protocol for
functions of one's own. What datatrove has (executors, deduplication, language and quality filters, readers and writers)
is taken from there; here is what it does not have: reading a recipe, the length rule, and token stores that merge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ultralong.data.read.documents import Document
from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.select.length_rule import LengthCounts, sample_subsets
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.utils.extras import require
from ultralong.utils.files import read_json, sha256, write_json

RATIOS = "characters_per_token.json"
SPARE = 3.0  # times its budget that is read of a source, as filters and deduplication will leave out some


class Step:
    """What the steps share: the recipe and where everything is.

    Args:
        recipe: A recipe's YAML file, or its name.
        base: Folder of the run, which every task sees.
        tokenizer: Folder of the tokenizer.
        cache: Where fetched packages are kept, which every task sees.
    """

    def __init__(self, recipe: str, base: str, tokenizer: str, cache: str | None = None) -> None:
        self.recipe_file, self.base, self.tokenizer, self.cache = recipe, Path(base), tokenizer, cache

    def recipe(self) -> Recipe:
        """The recipe.

        Raises:
            ValueError: It is of conversations, which are few: pack them on one machine.
        """
        recipe = load_recipe(self.recipe_file)
        if recipe.kind != "documents":
            raise ValueError(f"recipe {recipe.name} is of {recipe.kind}: it is packed on one machine.")
        return recipe


class Prepare(Step):
    """The first stage, one task: fetch packages, and measure how many characters a token has in each source."""

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write the measurements for all tasks."""
        recipe, tokenizer = self.recipe(), load_tokenizer(self.tokenizer)
        ratios = {}
        for source in recipe.sources:
            opened = SourceReader(source, recipe, self.cache, quiet=True)
            if opened.characters_per_token is None:
                opened.measure(opened.texts(), tokenizer)
            ratios[source.name] = opened.characters_per_token
        write_json(self.base / RATIOS, ratios)


class Read(Step):
    """A task's part of every source, cleaned and free of test sets; neither sampled nor repeated yet."""

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Documents in datatrove's form."""
        made = require("datatrove.data", extra="cluster").Document
        recipe, ratios = self.recipe(), read_json(self.base / RATIOS)
        for source in recipe.sources:
            opened = SourceReader(source, recipe, self.cache, quiet=True, part=(rank, world_size))
            # What a budget will never reach need not be read.
            spare = {
                name: math.inf if budget is None else SPARE * budget / world_size
                for name, budget in opened.budgets.items()
            }
            texts = sample_subsets(opened.texts(), spare, characters_per_token=ratios[source.name])
            for document in texts:
                yield made(
                    text=document.text,
                    id=document.id,
                    metadata={"source": document.source, "license": document.license},
                )
            write_json(self.base / "read" / f"{rank:05d}" / f"{source.name}.json", opened.report.as_json())


def language_filter(code: str, model: str | os.PathLike[str] | None = None) -> Any:
    """Datatrove's language filter, with the identifying model from a file where one is given.

    Args:
        code: What the model calls the language that is kept; a text passes with a score above 0.65.
        model: A fastText model whose labels are `__label__CODE`; None lets datatrove download lid.176.

    Raises:
        ValueError: There is no such file.
        ImportError: datatrove or fastText is missing.
    """
    made = require("datatrove.pipeline.filters", extra="cluster").LanguageFilter(languages=code)
    if model is not None:
        if not Path(model).is_file():
            raise ValueError(f"language model {model} is not there: give a fastText model's file that every task sees.")
        # datatrove copies it beside the models that it downloads, under a name that changes with the content.
        made.model.MODEL_URL, made.model.MODEL_SUBFOLDER = str(model), sha256(model)[:16]
    return made


class Tokenise(Step):
    """The last stage: the length rule, a task's part of the budgets, and a token store for each task."""

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> None:
        """Write `base/tokens/NNNNN`."""
        recipe, ratios = self.recipe(), read_json(self.base / RATIOS)
        budgets, rates, counts = {}, {}, {}
        for source in recipe.sources:
            for name, budget in recipe.budgets(source).items():
                budgets[name] = math.inf if budget is None else budget / world_size
                rates[name] = ratios[source.name]
                counts[name] = LengthCounts()

        def documents() -> Iterator[Document]:
            for item in data:
                yield Document(item.id, item.text, item.metadata["source"], item.metadata["license"])

        out = self.base / "tokens" / f"{rank:05d}"
        taken = sample_subsets(
            documents(), budgets, rule=recipe.length_rule, seed=recipe.seed, characters_per_token=rates, counts=counts
        )
        tokenize_corpus(taken, load_tokenizer(self.tokenizer), out, quiet=True)
        write_json(
            out / "sources.json",
            {name: {"characters_per_token": rates[name], "lengths": count.as_json()} for name, count in counts.items()},
        )
