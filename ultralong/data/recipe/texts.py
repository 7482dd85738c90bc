"""The texts of a recipe, for looking at them or for other uses than packing: documents, or conversations."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import Document
from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.data.recipe.sources import SourceReader


def read_documents(
    recipe: Recipe | str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, quiet: bool = False
) -> Iterator[Document]:
    """The documents of a recipe as they would be tokenised, for looking at them or for other uses of the texts.

    Lengths are estimated at 3.68 characters a token where the recipe does not say, since no tokenizer is at hand.

    Args:
        recipe: A recipe, its name or its YAML file.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    for source in recipe.sources:
        yield from SourceReader(source, recipe, cache, quiet).documents()


def read_conversations(
    recipe: Recipe | str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, quiet: bool = False
) -> Iterator[Conversation]:
    """The conversations of a recipe of kind chat that are well formed; the others are left out.

    Args:
        recipe: A recipe, its name or its YAML file.
        cache: Where fetched packages are kept.
        quiet: True shows no progress bars.

    Raises:
        ValueError: The recipe is of documents.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.kind != "chat":
        raise ValueError(f"recipe {recipe.name} is of {recipe.kind}; conversations come from one of kind chat.")
    for source in recipe.sources:
        yield from SourceReader(source, recipe, cache, quiet).conversations()
