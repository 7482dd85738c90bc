"""Paths that begin with `~`: a shell expands them, a settings file does not."""

from __future__ import annotations

import os
from typing import Any


def expand_home(settings: Any, *names: str) -> None:
    """Put the home folder in the place of a leading `~` in fields of a frozen dataclass; for its `__post_init__`.

    Args:
        settings: The dataclass.
        names: Fields that hold a path, or a hub id, or None.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str) and value.startswith("~"):
            object.__setattr__(settings, name, os.path.expanduser(value))


def expand_word(word: str) -> str:
    """A word of a command line with `~` expanded where shells leave it: in `--option=~/path`, and where none ran."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(word) if word.startswith("~/") else word
