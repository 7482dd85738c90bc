"""What the functions of the public API accept for a model and for changes of a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

MINIATURE = "miniature"  # as a model's name: the one that ships with the package


def folder_of(model: Any) -> Any:
    """The folder of the miniature by its name; everything else as it is."""
    if model != MINIATURE or os.path.exists(MINIATURE):
        return model
    from ultralong import miniature

    return miniature.path()


def as_overrides(changes: Mapping[str, Any] | None) -> list[str]:
    """`{"a.b": value}` as the `a.b=value` strings that `ultralong.utils.settings` reads."""
    import json

    return [f"{key}={json.dumps(value, default=str)}" for key, value in (changes or {}).items()]
