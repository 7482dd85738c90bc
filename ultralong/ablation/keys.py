"""Names of artefacts: a hash of everything that decides their bytes, and the recipes that are part of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ultralong.ablation.design import Rows, Sft
from ultralong.checkpoints.files import weight_files
from ultralong.data.chat.subsample import Subsample
from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.utils import settings
from ultralong.utils.files import sha256

KEY_LENGTH = 16  # hexadecimal digits: 64 bits
TEMPLATE = "chat_template.jinja"  # beside the tokenizer, or within its config


def key(kind: str, *parts: Any) -> str:
    """The name of an artefact: a hash of what decides its bytes."""
    text = json.dumps([kind, *parts], sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]}"


def told(value: Any) -> Any:
    """The settings that are not at their defaults, so that a setting which a later version adds changes no key."""
    if isinstance(value, list | tuple):
        return [told(item) for item in value]
    if not is_dataclass(value):
        return value
    plain = settings.to_mapping(value)
    found = {}
    for field in fields(value):
        given = getattr(value, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is MISSING or given != default:
            nested = is_dataclass(given) or isinstance(given, list | tuple)
            found[field.name] = told(given) if nested else plain[field.name]
    return found


def model_key(folder: Path) -> str:
    """Key of a checkpoint: its config, tokenizer and weights."""
    names = ["config.json", *weight_files(folder)]
    names += [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    return key("model", [[name, sha256(folder / name)] for name in names])


def recipe_of(rows: Rows) -> Recipe:
    """The data recipe with a study's changes.

    Raises:
        ValueError: There is no such recipe, or a change does not fit it.
    """
    changes = {**rows.changes, **{f"packing.{name}": value for name, value in rows.packing.items()}}
    recipe = load_recipe(rows.recipe)
    if rows.max_characters is not None:
        sources = tuple(replace(source, max_characters=rows.max_characters) for source in recipe.sources)
        recipe = replace(recipe, sources=sources)
    texts = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    where = f"recipe {rows.recipe}"
    return settings.from_mapping(Recipe, settings.override(settings.to_mapping(recipe), texts, Recipe), where)


def conversations_of(sft: Sft) -> Recipe:
    """The recipe of conversations with a study's changes and its number of examples.

    Raises:
        ValueError: As in `recipe_of`.
    """
    recipe = recipe_of(sft.rows)
    if sft.examples is None:
        return recipe
    shares = None if recipe.subsample is None else recipe.subsample.shares
    return replace(recipe, subsample=Subsample(sft.examples, shares))


def rows_key(rows: Rows, length: int, tokenizer: str) -> str:
    """Key of packed rows."""
    return key("rows", told(recipe_of(rows)), rows.limit, length, tokenizer)


def conversations_key(sft: Sft, tokenizer: str, folder: Path) -> str:
    """Key of packed conversations.

    Args:
        sft: What they are made from.
        tokenizer: Key of the model before, which is that of its tokenizer too.
        folder: Its folder: a chat template in a file of its own is not in that key.
    """
    template = sha256(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else None
    return key("conversations", told(conversations_of(sft)), sft.rows.limit, sft.length, tokenizer, template)
